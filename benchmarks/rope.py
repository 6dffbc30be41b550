"""Which scheme keeps a model readable beyond its own window? Perplexity at 1x, 2x and 4x, untrained and trained.

    python -m benchmarks.rope [--reach 1 2 4] [--windows 4] [--schemes ...] [--train 0] [--dtype ...] [--minutes 60]
    python -m benchmarks.rope --table

For SmolLM2-135M-Instruct (window 8,192): the perplexity of the last 1,024 tokens of windows of real text that are 1, 2
and 4 times as long as its own, unscaled and under each scheme of ``rope_scaling``. ``--train N`` then trains an adapter
for N steps at 2x under the two schemes that are best there, and scores it at 4x. Every window is one line of
``results/rope.jsonl``: what is there is not measured again, and training goes on from its last checkpoint, so that the
command goes on where it stopped; ``--minutes`` ends it between two windows or steps. A GPU takes minutes, two CPU cores
hours. The text is the language reference of Python and then help pages of its library, as the standard library carries
them: each version of Python has a table of its own, and each dtype (by default the one that the machine computes best).
Windows do not overlap, and training uses other text than scoring.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, append_record

__all__ = ["measure", "scores", "table"]

MODEL = "smollm2-135m"
NATIVE = 8192
SCORED = 1024
"""Tokens at the end of a window whose perplexity counts: all of them see nearly the whole window."""

PLAIN = "unscaled"

Table = tuple[str, str]
"""What makes measurements comparable: the version of Python whose text is read, and the dtype that computes."""

RUNS = Path(__file__).parents[1] / ".cache" / "benchmarks" / "rope"
"""Where training keeps its checkpoints."""

PAGES = (
    "argparse", "ast", "datetime", "decimal", "email.message", "fractions", "http.client", "inspect", "ipaddress",
    "logging", "pathlib", "random", "socket", "statistics", "subprocess", "tarfile", "threading", "typing",
    "unittest", "zipfile",
)  # fmt: skip


def tokens_of_text(tokenizer: Any) -> list[int]:
    """Return the language reference, each section once, and the help pages of :data:`PAGES`, as one line of tokens."""
    import pydoc
    from pydoc_data.topics import topics

    sections = dict.fromkeys(topics[name] for name in sorted(topics))
    # A page ends with the path of its file on this machine, and shows where objects lie in memory.
    pages = [pydoc.render_doc(name, renderer=pydoc.plaintext).partition("\nFILE\n")[0] for name in PAGES]
    pages = [re.sub(r" at 0x[0-9a-f]+", "", page) for page in pages]
    return tokenizer("\n\n".join([*sections, *pages]), add_special_tokens=False)["input_ids"]


def load(scheme: str, reach: int, dtype: str) -> tuple[Any, Any]:
    """Return model and tokenizer with ``reach`` times the model's own window."""
    from tunesmith import FastLanguageModel

    stretched: dict[str, Any] = {}
    if reach > 1 and scheme != PLAIN:
        stretched = {"max_seq_length": reach * NATIVE, "rope_scaling": scheme}
    return FastLanguageModel.from_pretrained(MODEL, dtype=dtype, **stretched)


def perplexity(model: Any, tokens: list[int]) -> float:
    """Return the perplexity of the last :data:`SCORED` of ``tokens``."""
    from tunesmith.data.types import Document
    from tunesmith.evaluation.likelihood import row_losses

    trained = np.arange(len(tokens)) >= len(tokens) - SCORED
    losses, counts = row_losses(model, [[Document(np.asarray(tokens, dtype=np.int32), trained, "window")]])
    return math.exp(losses[0] / counts[0])


def trained_model(scheme: str, tokens: list[int], steps: int, folder: Path, end: float, dtype: str) -> Any | None:
    """Return a model stretched to 4x whose adapter was trained ``steps`` steps on windows of 2x of ``tokens``.

    None where it was ``end`` (of ``time.monotonic``) before the last step: the next call goes on from ``folder``.
    """
    from transformers import TrainerCallback

    from tunesmith import FastLanguageModel, SFTConfig, SFTTrainer

    class StopInTime(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= time.monotonic() > end

    model, tokenizer = load(scheme, 4, dtype)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
    length = 2 * NATIVE
    starts = np.linspace(0, len(tokens) - length, steps).astype(int)
    rows = [{"text": tokenizer.decode(tokens[start : start + length - 16])} for start in starts]
    args = SFTConfig(
        output_dir=str(folder), max_steps=steps, max_length=length, on_too_long="truncate", eval_split=0,
        per_device_train_batch_size=1, gradient_accumulation_steps=1, learning_rate=2e-4, report_to="none",
        save_strategy="steps", save_steps=1, save_total_limit=1, logging_steps=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[StopInTime()]
    )
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return model if trainer.state.global_step == steps else None


def scores(of: Table) -> dict[tuple[str, int, int, int], float]:
    """Return (scheme, reach, window, trained steps) -> perplexity of what is recorded for a table."""
    return {
        (line["scheme"], line["reach"], line["window"], line["steps"]): line["perplexity"]
        for line in _lines()
        if _table_of(line) == of
    }


def _table_of(line: dict[str, Any]) -> Table:
    return line["python"], line["dtype"]


def _lines() -> list[dict[str, Any]]:
    file = RESULTS / "rope.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _measurements(
    reaches: list[int], windows: int, schemes: list[str], steps: int, of: Table
) -> Iterator[tuple[str, int, int, int]]:
    for reach in reaches:
        # One scheme after the other: to load a model takes longer than a GPU takes to score a window.
        for scheme in [PLAIN] if reach == 1 else schemes:
            yield from ((scheme, reach, window, 0) for window in range(windows))
    for scheme in _best(2, of) if steps else ():
        yield from ((scheme, 4, window, steps) for window in range(windows))


def _best(count: int, of: Table) -> list[str]:
    """Return the schemes with the lowest untrained perplexity at 2x."""
    at_2x = {scheme: value for (scheme, reach, steps), value in _means(of).items() if (reach, steps) == (2, 0)}
    return sorted((scheme for scheme in at_2x if scheme != PLAIN), key=at_2x.__getitem__)[:count]


def _means(of: Table) -> dict[tuple[str, int, int], float]:
    """Return (scheme, reach, trained steps) -> geometric mean of the perplexities of its windows."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for (scheme, reach, _, steps), value in scores(of).items():
        found.setdefault((scheme, reach, steps), []).append(math.log(value))
    return {key: math.exp(statistics.fmean(values)) for key, values in found.items()}


def measure(reaches: list[int], windows: int, schemes: list[str], steps: int, minutes: float, dtype: str) -> bool:
    """Record every measurement that is not there yet; return False where ``minutes`` ended it before the last."""
    end = time.monotonic() + 60 * minutes
    own = platform.python_version(), dtype
    loaded: tuple[Any, Any] = (None, None)
    for key in _measurements(reaches, windows, schemes, steps, own):
        scheme, reach, window, trained = key
        if key in scores(own):
            continue
        if time.monotonic() > end:
            return False
        start = time.perf_counter()
        if loaded[0] != (scheme, reach, trained):
            model, tokenizer = load(scheme, reach, dtype)
            tokens = tokens_of_text(tokenizer)
            if trained:
                # Scored windows lie in the first part, so that training starts behind them.
                folder = RUNS / f"{'-'.join(own)}-{scheme}-{windows}-{trained}"
                model = trained_model(scheme, tokens[windows * 4 * NATIVE :], trained, folder, end, dtype)
                if model is None:
                    return False
            loaded = ((scheme, reach, trained), (model, tokens))
        model, tokens = loaded[1]
        # All reaches score the same tokens: a window ends where the longest one does.
        last = (window + 1) * 4 * NATIVE
        if last > len(tokens):
            raise SystemExit(f"the text holds {len(tokens) // (4 * NATIVE)} windows; --windows {windows} asks for more")
        value = perplexity(model, tokens[last - reach * NATIVE : last])
        record = {
            "python": own[0],
            "scheme": scheme,
            "reach": reach,
            "window": window,
            "steps": trained,
            "perplexity": value,
            "dtype": str(model.dtype).removeprefix("torch."),
            "seconds": time.perf_counter() - start,
        }
        print(append_record("rope", record), flush=True)
    return True


def table(of: Table) -> str:
    """Return what is recorded as a table in Markdown: mean perplexity, and how many windows it is over."""
    means, counted = _means(of), scores(of)
    columns = sorted({(reach, steps) for _, reach, steps in means})
    heads = [f"{reach}x{f', {steps} steps at 2x' if steps else ''}" for reach, steps in columns]
    lines = [f"| scheme | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for scheme in dict.fromkeys(scheme for scheme, _, _ in means):
        cells = []
        for reach, steps in columns:
            windows = sum((s, r, t) == (scheme, reach, steps) for s, r, _, t in counted)
            cells.append(f"{means[scheme, reach, steps]:.1f} ({windows})" if windows else "")
        lines.append(f"| {scheme} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table of what was measured."""
    from tunesmith.core.device import choose_device, choose_dtype
    from tunesmith.models.rope import SCHEMES

    every = [PLAIN, *SCHEMES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reach", type=int, nargs="+", default=[1, 2, 4], choices=[1, 2, 4])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--schemes", nargs="+", default=every, choices=every)
    parser.add_argument("--train", type=int, default=0, metavar="STEPS")
    parser.add_argument("--dtype")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    dtype = choose_dtype(args.dtype, choose_device()).name
    if not args.table and not measure(args.reach, args.windows, args.schemes, args.train, args.minutes, dtype):
        print(f"{args.minutes} minutes are over: run the command again to go on")
    for of in dict.fromkeys(map(_table_of, _lines())):
        print(f"Text of Python {of[0]}, {of[1]}:\n\n{table(of)}\n")


if __name__ == "__main__":
    main()
