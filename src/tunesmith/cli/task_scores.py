"""What ``tunesmith evaluate`` does with a model for another task than language modelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.table import Table

from tunesmith.cli.console import console, print_lines
from tunesmith.core.errors import EvaluationError
from tunesmith.core.tasks import TASKS
from tunesmith.data.files import list_splits
from tunesmith.data.task_rows import read_records
from tunesmith.data.tasks import TaskRow, prepare_records
from tunesmith.engine.modes import adapter_disabled
from tunesmith.evaluation.intervals import wilson
from tunesmith.models.heads import give_padding
from tunesmith.models.load import facts_of
from tunesmith.training.tasks.recipes import recipe_for
from tunesmith.training.tasks.trainer import score_rows

__all__ = ["TaskScores", "print_scores", "score_task"]


@dataclass(frozen=True, slots=True)
class TaskScores:
    """Figures of a model over rows, and of its base where that is another model without a new head.

    ``interval`` bounds ``best``, a share of ``count`` things, at 95 % (Wilson).
    """

    task: str
    best: str
    count: int
    counts: str
    figures: Mapping[str, float]
    rows: tuple[TaskRow, ...]
    answers: tuple[Any, ...]
    base: Mapping[str, float] | None = None
    refused: Mapping[str, int] = field(default_factory=dict)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of :attr:`best`."""
        return wilson(round(self.figures[self.best] * self.count), self.count)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures and the answer to each row for JSON."""
        rows = [{"where": row.where, "answer": text} for row, text in zip(self.rows, self.answers, strict=True)]
        own = {"task": self.task, "model": dict(self.figures), self.best: {"interval": list(self.interval)}}
        base = {} if self.base is None else {"base": dict(self.base)}
        return {**own, **base, "count": self.count, "refused": dict(self.refused), "rows": rows}


def score_task(
    model: Any,
    tokenizer: Any,
    data: str,
    mapping: Mapping[str, str] | None,
    *,
    limit: int | None,
    batch_size: int,
    base: bool,
    progress: Callable[[str, int, int], None],
) -> TaskScores:
    """Score a model on the test, valid or train rows of ``data``, whichever is there first.

    Raises:
        EvaluationError: no row can be used, or ``limit`` or ``batch_size`` is below 1.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name} is {value}. Use 1 or more.")
    task = facts_of(model).task
    give_padding(model, tokenizer)
    recipe = recipe_for(model, tokenizer)
    there = list_splits(data)
    split = next((name for name in ("test", "valid", "train") if name in there), there[0])
    records = read_records(data, task, mapping=mapping, split=split, limit=limit)
    prepared = prepare_records(records, task, tokenizer, labels=recipe.labels, max_length=facts_of(model).window)
    if not prepared.rows:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in prepared.ledger.dropped.items())
        raise EvaluationError(f"no row can be scored: {reasons}.")
    run = partial(score_rows, model, recipe, prepared.rows, batch_size=batch_size)
    before = None
    # Beside a new head there is nothing to compare with: on the base it is random.
    if base and hasattr(model, "peft_config") and not TASKS[task].heads:
        with adapter_disabled(model):
            before, _ = run(progress=partial(progress, "base"))
    figures, answers = run(progress=partial(progress, "model"))
    rows, refused = tuple(prepared.rows), dict(prepared.ledger.dropped)
    size = recipe.size(rows)
    return TaskScores(task, recipe.best, size, recipe.counts, figures, rows, tuple(answers), before, refused)


def print_scores(scores: TaskScores) -> None:
    """Print a table of figures, one line a model."""
    print_lines([f"{scores.task} on {len(scores.rows):,} rows"])
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in scores.figures:
        table.add_column(name, justify="right", no_wrap=True)
    for name, figures in (("base", scores.base), ("model", scores.figures)):
        if figures is not None:
            table.add_row(name, *(f"{v:.4g}" if key == "loss" else f"{100 * v:.1f} %" for key, v in figures.items()))
    console().print(table)
    low, high = scores.interval
    print_lines([f"{scores.best}: 95 % from {100 * low:.1f} % to {100 * high:.1f} %, {scores.count:,} {scores.counts}"])
    print_lines(f"left out: {count:,} rows, {reason}" for reason, count in scores.refused.items())
