"""How far does training on a base in 4 bits end from training on the whole one? The same rows, order and adapter.

    python -m benchmarks.nf4 [--sets ...] [--learning-rate 2e-4] [--dtype ...] [--minutes 60]
    python -m benchmarks.nf4 --table

Every set of the ``evals`` package that has at least 300 rows, with answers of ten characters or more on average, and no
other choice: 30 steps of 8 rows of SmolLM2-135M-Instruct, loss on answers, with the settings of ``SFTConfig()`` and
``get_peft_model()`` but for the learning rate. Arms: ``whole``, the base in 16 bits (32 on a CPU without bfloat16);
``nf4``, ``load_in_4bit``; ``loftq``, ``load_in_4bit`` of a base saved with ``init_lora_weights="loftq"``. What is
compared is the loss on 60 rows that are not trained, before and after, and on the last ten steps. An arm of a set is
one line of ``results/nf4.jsonl``; what is there for this dtype and rate is not measured again. Rows are read from their
package and never stored here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.record import RESULTS, append_record
from benchmarks.sarcasm import rows_of

__all__ = ["chosen_sets", "measure", "table"]

MODEL = "smollm2-135m"
STEPS, ROWS, HELD_OUT, LAST = 30, 8, 60, 10
FOLDER = Path(__file__).parents[1] / ".cache" / "benchmarks" / "nf4"
ARMS = ("whole", "nf4", "loftq")
FIGURES = ("before", "last_steps", "held_out")


def chosen_sets() -> list[str]:
    """Return the names of the sets that the rule at the head of this file chooses."""
    found: list[str] = []
    for file in importlib.metadata.files("evals") or ():
        path = Path(str(file.locate()))
        if path.name != "samples.jsonl" or not path.is_file() or path.stat().st_size > 3_000_000:
            continue
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(rows) < 300 or not isinstance(rows[0].get("input"), list) or "ideal" not in rows[0]:
            continue
        if statistics.fmean(len(_answer(row)) for row in rows) >= 10:
            found.append(path.parent.name)
    return sorted(found)


def _answer(row: dict[str, Any]) -> str:
    ideal = row["ideal"]
    return str(ideal[0] if isinstance(ideal, list) else ideal)


def load(arm: str, dtype: str) -> tuple[Any, Any]:
    """Return the model of an arm with its adapter, and its tokenizer."""
    from tunesmith import FastLanguageModel

    if arm == "loftq":
        folder = FOLDER / f"loftq-{dtype}"
        if not (folder / "tokenizer_config.json").is_file():
            base, tokenizer = FastLanguageModel.from_pretrained(MODEL, dtype=dtype)
            FastLanguageModel.get_peft_model(base, init_lora_weights="loftq").save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return FastLanguageModel.from_pretrained(str(folder), load_in_4bit=True, dtype=dtype)
    model, tokenizer = FastLanguageModel.from_pretrained(MODEL, load_in_4bit=arm == "nf4", dtype=dtype)
    return FastLanguageModel.get_peft_model(model), tokenizer


def trained(arm: str, rows: list[dict[str, Any]], dtype: str, rate: float) -> dict[str, Any]:
    """Train an arm on all but the first rows and return its losses."""
    from tunesmith import SFTConfig, SFTTrainer

    model, tokenizer = load(arm, dtype)
    with TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=ROWS, gradient_accumulation_steps=1,
            logging_steps=1, eval_split=0, save_strategy="no", report_to="none", disable_tqdm=True,
            on_too_long="truncate", learning_rate=rate,
        )  # fmt: skip
        trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows[HELD_OUT:], args=args)
        before = trainer.evaluate(rows[:HELD_OUT])["eval_loss"]
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        held_out = trainer.evaluate(rows[:HELD_OUT])["eval_loss"]
    return {
        "before": before, "last_steps": statistics.fmean(losses[-LAST:]), "held_out": held_out, "losses": losses,
        "rank": model.peft_config["default"].r,
    }  # fmt: skip


def measure(sets: list[str], dtype: str, rate: float, minutes: float) -> bool:
    """Record every arm of every set that is not there yet; return False where ``minutes`` ended it before the last."""
    end = time.monotonic() + 60 * minutes
    there = {(line["set"], line["arm"]) for line in _lines(dtype, rate)}
    for name in sets:
        rows = rows_of(name)
        random.Random(0).shuffle(rows)
        for arm in ARMS:
            if (name, arm) in there:
                continue
            if time.monotonic() > end:
                return False
            start = time.perf_counter()
            facts = {"set": name, "arm": arm, "dtype": dtype, "learning_rate": rate, **trained(arm, rows, dtype, rate)}
            append_record("nf4", {**facts, "seconds": time.perf_counter() - start})
            print(name, arm, *(f"{key} {facts[key]:.4f}" for key in FIGURES), flush=True)
    return True


def _lines(dtype: str, rate: float) -> list[dict[str, Any]]:
    file = RESULTS / "nf4.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [line for line in lines if (line["dtype"], line["learning_rate"]) == (dtype, rate)]


def table(dtype: str, rate: float) -> str:
    """Return what is recorded as a table in Markdown: the whole base's losses, and how far the others are above."""
    by_set: dict[str, dict[str, dict[str, Any]]] = {}
    for line in _lines(dtype, rate):
        by_set.setdefault(line["set"], {})[line["arm"]] = line
    whole = {name: arms for name, arms in by_set.items() if set(arms) == set(ARMS)}
    columns = [(arm, figure) for arm in ARMS[1:] for figure in FIGURES]
    lines = [f"| set | {' | '.join(FIGURES)} | {' | '.join(f'{arm} {figure}' for arm, figure in columns)} |"]
    lines.append("|---" * (1 + len(FIGURES) + len(columns)) + "|")
    apart: dict[tuple[str, str], list[float]] = {column: [] for column in columns}
    for name, arms in whole.items():
        for arm, figure in columns:
            apart[arm, figure].append(arms[arm][figure] / arms["whole"][figure] - 1)
        own = [f"{arms['whole'][figure]:.3f}" for figure in FIGURES]
        lines.append(f"| {name} | {' | '.join([*own, *(f'{apart[column][-1]:+.1%}' for column in columns)])} |")
    if whole:
        medians = [f"{statistics.median(apart[column]):+.1%}" for column in columns]
        within = [f"{sum(value <= 0.03 for value in apart[column])} of {len(whole)}" for column in columns]
        lines.append(f"| median | {' | '.join([''] * len(FIGURES) + medians)} |")
        lines.append(f"| at most 3 % above | {' | '.join([''] * len(FIGURES) + within)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table of what was measured."""
    from tunesmith.core.device import choose_device, choose_dtype

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", help="by default all that the rule chooses")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtype")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    dtype = choose_dtype(args.dtype, choose_device()).name
    if not args.table and not measure(args.sets or chosen_sets(), dtype, args.learning_rate, args.minutes):
        print(f"{args.minutes} minutes are over: run the command again to go on")
    print(table(dtype, args.learning_rate))


if __name__ == "__main__":
    main()
