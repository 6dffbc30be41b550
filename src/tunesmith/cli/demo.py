"""``tunesmith demo``: the whole way on a generated task - rows, training, and what it changed.

The task is free-text support messages to one line of JSON (:mod:`tunesmith.data.support_task`). Held-out rows share no
sentence frame and no value with training rows.
"""

from __future__ import annotations

import datetime
import functools
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tunesmith.cli.console import console, print_lines
from tunesmith.cli.evaluate import AnswerProgress
from tunesmith.cli.train import train_and_show
from tunesmith.core.errors import OutputError
from tunesmith.training.settings import load_run_settings

if TYPE_CHECKING:
    from tunesmith.training.run import RunResult

__all__ = ["DEMO_SETTINGS", "command"]

DEMO_SETTINGS: dict[str, Any] = {
    "model": "smollm2-135m",
    "r": 16,
    "lora_alpha": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "num_train_epochs": 1.2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "eval_steps": 30,
    "use_gradient_checkpointing": False,
    "max_seq_length": 1024,
}
"""What the demo trains with, beside its data, seed and folder."""

_TRAIN_ROWS, _EVAL_ROWS, _HELD_OUT_ROWS = 600, 30, 100
_LONGEST_ANSWER = 64

Row = dict[str, Any]


def command(
    seed: Annotated[int, typer.Option(help="Seeds the rows, the adapter and the order of training.", min=0)] = 0,
    output_dir: Annotated[
        Path | None, typer.Option(help="New folder for rows and run; none makes runs/<date>-demo.", show_default=False)
    ] = None,
) -> None:
    """Train SmolLM2-135M to turn support messages into JSON, and show what changed.

    Beside the tuned model stands the untouched one, with and without the JSON schema and two examples in its prompt.
    """
    folder = _new_folder(output_dir)
    flags = {**DEMO_SETTINGS, "data": str(folder / "data"), "output_dir": str(folder / "run")}
    settings, _ = load_run_settings(None, {**flags, "seed": seed, "random_state": seed})
    held_out = _write_rows(folder / "data", seed)
    result = train_and_show(settings)
    _print_comparison(_compare(result, held_out), result)
    run, data = shlex.quote(str(result.folder)), shlex.quote(str(folder / "data"))
    console().print("next:")
    print_lines([f"  tunesmith chat {run}", f"  tunesmith evaluate --model {run} --data {data} --metric json_match"])


@dataclass(frozen=True, slots=True)
class _Side:
    """One line of the comparison: shares of right answers, as text and as JSON values."""

    name: str
    exact: float
    as_json: float
    seconds: float


def _new_folder(asked: Path | None) -> Path:
    folder = asked or Path("runs") / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-demo"
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise OutputError(f"--output-dir {folder} is not empty. Give a new folder.")
    return folder


def _write_rows(folder: Path, seed: int) -> list[Row]:
    """Write train.jsonl, valid.jsonl and test.jsonl, and return the held-out rows, which are those of test.jsonl."""
    from tunesmith.core.files import make_folder, write_text
    from tunesmith.data.support_task import generate

    seen, held_out = generate("train", _TRAIN_ROWS + _EVAL_ROWS, seed), generate("heldout", _HELD_OUT_ROWS, seed)
    make_folder(folder)
    for name, rows in (("train", seen[:_TRAIN_ROWS]), ("valid", seen[_TRAIN_ROWS:]), ("test", held_out)):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return held_out


def _compare(result: RunResult, rows: Sequence[Row]) -> list[_Side]:
    """Return the scores of the untouched model, the same with a prompt that says everything, and the tuned model."""
    from tunesmith.api import FastLanguageModel
    from tunesmith.data.support_task import few_shot_prompt
    from tunesmith.evaluation import adapter_disabled

    console().rule("held-out rows", align="left", style="dim")
    model = FastLanguageModel.for_inference(result.trainer.model)
    tokenizer = result.trainer.processing_class
    plain = [row["messages"][:-1] for row in rows]
    with AnswerProgress() as progress:

        def side(name: str, prompts: list[Any]) -> _Side:
            return _score(model, tokenizer, prompts, rows, name, progress)

        with adapter_disabled(model):
            untouched = side("untouched model", plain)
            prompted = side("with schema and two examples", [few_shot_prompt(row) for row in rows])
        return [untouched, prompted, side("tuned model", plain)]


def _score(
    model: Any, tokenizer: Any, prompts: list[Any], rows: Sequence[Row], name: str, progress: AnswerProgress
) -> _Side:
    from tunesmith.evaluation import generate_answers, score_answers

    began = time.perf_counter()
    answers = generate_answers(
        model, tokenizer, prompts, max_new_tokens=_LONGEST_ANSWER, progress=functools.partial(progress, name)
    )
    seconds = time.perf_counter() - began
    wanted = [row["messages"][-1]["content"] for row in rows]
    exact, as_json = (score_answers(metric, answers, wanted).value for metric in ("exact_match", "json_match"))
    return _Side(name, exact, as_json, seconds)


def _print_comparison(sides: Sequence[_Side], result: RunResult) -> None:
    from tunesmith.cli.report import facts_table, result_facts

    table = Table(box=None, pad_edge=False)
    for name in (f"{_HELD_OUT_ROWS} held-out rows", "exact match", "same JSON", "seconds"):
        table.add_column(name, justify="left" if name.endswith("rows") else "right", no_wrap=True)
    for side in sides:
        shares = (f"{100 * share:.0f} %" for share in (side.exact, side.as_json))
        table.add_row(side.name, *shares, f"{side.seconds:.1f}", style="bold" if side is sides[-1] else None)
    console().print(table)
    console().rule("result", align="left", style="dim")
    console().print(facts_table(result_facts(result)))
