"""Score a model on rows, and with an adapter the base beside the tuned model.

    rows -> EvaluationRow (prompt, references) -> answers -> Score ─┐
                      the same with the adapter switched off ───────┴─> Report, with the paired difference

The prompt of a conversation is every message before its last assistant turn, which is the reference; the rest of the
chain (templates, batching, metrics) is in generate.py, likelihood.py and metrics.py.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import EvaluationError, OutputError
from tunesmith.data.masks import ExampleEncoder
from tunesmith.data.types import Completion, Conversation, Example, RowRefusedError, SourceRow, Text, Tokens
from tunesmith.engine.modes import adapter_disabled
from tunesmith.evaluation.generate import generate_answers, no_room
from tunesmith.evaluation.likelihood import row_losses
from tunesmith.evaluation.metrics import (
    Difference,
    Score,
    check_references,
    compare,
    get_metric,
    perplexity_score,
    score_answers,
)
from tunesmith.models.prompts import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EvaluationRow", "Report", "Side", "evaluate", "read_evaluation_rows"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One row to be scored. ``references`` are the right answers, any of which counts; ``example`` is the whole row."""

    prompt: str | list[dict[str, Any]]
    references: tuple[str, ...]
    where: str
    example: Example
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """What one model did in ``seconds``: it wrote ``tokens`` tokens, or scored that many and has no ``answers``."""

    score: Score
    answers: tuple[str, ...]
    seconds: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        speed = self.tokens / self.seconds if self.seconds > 0 else 0.0
        return {**self.score.as_dict(), "seconds": round(self.seconds, 3), "tokens_per_second": round(speed, 1)}


@dataclass(frozen=True, slots=True)
class Report:
    """The result of :func:`evaluate`. ``base`` and ``difference`` are None where there is no adapter to switch off.

    ``refused`` counts the rows of a data source that could not be used, by reason.
    """

    metric: str
    rows: tuple[EvaluationRow, ...]
    tuned: Side
    base: Side | None = None
    difference: Difference | None = None
    refused: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures for JSON, without the rows."""
        figures: dict[str, Any] = {"metric": self.metric, "model": self.tuned.as_dict(), "refused": dict(self.refused)}
        if self.base is not None and self.difference is not None:
            figures |= {"base": self.base.as_dict(), "difference": self.difference.as_dict()}
        return figures

    def row_dicts(self) -> Iterator[dict[str, Any]]:
        """Yield one dict a row: where, prompt, references, and each model's answer and score."""
        sides = {"": self.tuned, "base_": self.base}
        for index, row in enumerate(self.rows):
            entry: dict[str, Any] = {"where": row.where, "prompt": row.prompt, "references": list(row.references)}
            for prefix, side in sides.items():
                if side is not None:
                    if side.answers:
                        entry[f"{prefix}answer"] = side.answers[index]
                    entry[f"{prefix}score"] = side.score.per_row[index]
            yield entry

    def write_rows(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`row_dicts` as JSON lines to a new file.

        Raises:
            OutputError: the file exists or cannot be written.
        """
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.row_dicts())
        except FileExistsError:
            raise OutputError(f"{os.fspath(path)} exists already and is not overwritten. Give another path.") from None
        except OSError as error:
            raise OutputError(f"{os.fspath(path)} cannot be written: {error.strerror}. Give another path.") from error


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    metric: str,
    *,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    limit: int | None = None,
    with_base: bool = True,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    temperature: float = 0.0,
    stop: str | Sequence[str] | None = None,
    seed: int = 3407,
    progress: Progress | None = None,
) -> Report:
    """Score ``model`` on ``rows``; a PEFT model also without its adapter, unless ``with_base`` is False.

    Args:
        rows: a data source that ``tunesmith.data.files.read_rows`` reads, or a list of rows from
            :func:`read_evaluation_rows` or of examples.
        metric: a name of ``tunesmith.evaluation.METRICS``.
        split, mapping, limit: see :func:`read_evaluation_rows`.
        max_new_tokens, batch_size, temperature, stop: see :func:`tunesmith.evaluation.generate_answers`.
        seed: drives sampling (``temperature`` above 0) and the bootstrap.
        progress: called with ("base" or "model", rows done, all rows).

    Raises:
        EvaluationError: unknown metric, no usable row, or a reference that the metric cannot use.
        ModelError: the rows are conversations and the tokenizer has no chat template.
    """
    needs_answers = get_metric(metric).needs_answers
    kept, refused = read_evaluation_rows(rows, split=split, mapping=mapping, limit=limit, with_reference=needs_answers)
    room = max_new_tokens if needs_answers else 0
    inputs, kept, refused = _encode(model, tokenizer, kept, refused, needs_answers=needs_answers, room=room)
    references = check_references(metric, [row.references for row in kept]) if needs_answers else []

    def run(label: str) -> Side:
        report = None if progress is None else functools.partial(progress, label)
        start = time.perf_counter()
        if not needs_answers:
            losses, counts = row_losses(model, inputs, progress=report)
            seconds = time.perf_counter() - start
            return Side(perplexity_score(losses, counts, seed=seed), (), seconds, sum(counts))
        answers = generate_answers(
            model,
            tokenizer,
            inputs,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            stop=stop,
            seed=seed,
            progress=report,
        )
        seconds = time.perf_counter() - start
        tokens = sum(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"]))
        score = score_answers(metric, answers, references, seed=seed)
        return Side(score, tuple(answers), seconds, tokens)

    if not with_base or not _has_adapter(model):
        return Report(metric, tuple(kept), run("model"), refused=refused)
    with adapter_disabled(model):
        base = run("base")
    tuned = run("model")
    return Report(metric, tuple(kept), tuned, base, compare(base.score, tuned.score, seed=seed), refused)


def read_evaluation_rows(
    rows: Any,
    *,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    limit: int | None = None,
    with_reference: bool = True,
) -> tuple[list[EvaluationRow], dict[str, int]]:
    """Return the usable rows of a data source or a list, and how many were refused for which reason.

    Args:
        rows: a data source (see ``tunesmith.data.files.read_rows``) or a list of examples.
        split: of a data source; None takes "test" where there is one, else "valid", else "train".
        mapping: source column to role, as in training.
        limit: only the first so many usable rows.
        with_reference: False keeps plain text too, which has no answer to compare with but has a likelihood.

    Raises:
        EvaluationError: no row can be used; the message counts the reasons.
        DataError: the source cannot be read.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit is {limit}. Use 1 or more, or None for every row.")
    kept: list[EvaluationRow] = []
    refused: Counter[str] = Counter()
    for row in _items(rows, split):
        if len(kept) == limit:
            break
        try:
            kept.append(_evaluation_row(row, mapping, with_reference=with_reference))
        except RowRefusedError as error:
            refused[error.reason] += 1
    _require_rows(kept, refused)
    return kept, dict(refused)


def _require_rows(kept: Sequence[EvaluationRow], refused: Mapping[str, int]) -> None:
    if not kept:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in refused.items()) or "there is none"
        raise EvaluationError(f"no row can be scored: {reasons}. Check the data's schema, or map its columns.")


def _items(rows: Any, split: str | None) -> Iterable[SourceRow | Example | EvaluationRow]:
    """Return the entries of a list of ours as they are, else the rows of the data source."""
    from tunesmith.data.files import list_splits, read_rows

    ours = (SourceRow, Conversation, Completion, Text, EvaluationRow)
    if isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, ours) for row in rows):
        return rows
    if split is None:
        there = list_splits(rows)
        split = next((name for name in ("test", "valid", "train") if name in there), there[0])
    return read_rows(rows, split=split)


def _evaluation_row(
    row: SourceRow | Example | EvaluationRow, mapping: Mapping[str, str] | None, *, with_reference: bool
) -> EvaluationRow:
    """Return the row's prompt and references, or raise :class:`RowRefusedError`."""
    if isinstance(row, EvaluationRow):
        return row
    if not isinstance(row, SourceRow):
        return _from_example(row, with_reference=with_reference)
    from tunesmith.data.formats import to_example

    found = _from_example(to_example(row, mapping), with_reference=with_reference)
    ideal = row.value.get("ideal") if mapping is None else None
    if found.example.schema == "evals" and isinstance(ideal, list) and all(isinstance(text, str) for text in ideal):
        # An evals row trains on its first ideal answer, but any of them is right.
        return EvaluationRow(found.prompt, tuple(ideal), found.where, found.example, found.tools)
    return found


def _from_example(example: Example, *, with_reference: bool) -> EvaluationRow:
    """Split an example into prompt and reference."""
    if isinstance(example, Completion):
        return EvaluationRow(example.prompt, (example.completion,), example.where, example)
    if isinstance(example, Tokens):
        raise RowRefusedError("token ids", f"{example.where} is tokenized; give its text or messages to be scored.")
    if isinstance(example, Text):
        if with_reference:
            raise RowRefusedError("no answer to compare with", f"{example.where} is plain text; use perplexity for it.")
        return EvaluationRow(example.text, (), example.where, example)
    if example.images:
        raise RowRefusedError("images", f"{example.where} shows images, which are not evaluated yet.")
    last = max(index for index, message in enumerate(example.messages) if message["role"] == "assistant")
    answer = example.messages[last].get("content")
    if with_reference and not isinstance(answer, str):
        raise RowRefusedError(
            "last assistant turn has no text", f"{example.where}: the last assistant turn has no text."
        )
    references = (answer,) if isinstance(answer, str) else ()
    return EvaluationRow(example.messages[:last], references, example.where, example, example.tools)


def _encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EvaluationRow],
    refused: Mapping[str, int],
    *,
    needs_answers: bool,
    room: int,
) -> tuple[list[Any], list[EvaluationRow], dict[str, int]]:
    """Return what the model is given for each row, the rows that could be encoded, and the count of those refused.

    For answers that is the prompt's token ids, for a likelihood the whole row's documents with their trained tokens.
    ``room`` is left free behind them.
    """
    encoder = None if needs_answers else ExampleEncoder(tokenizer)
    inputs: list[Any] = []
    kept: list[EvaluationRow] = []
    counts = Counter(refused)
    for row in rows:
        try:
            encoded = (
                encode_prompt(tokenizer, row.prompt, tools=row.tools)
                if encoder is None
                else encoder.encode(row.example)
            )
            longest = len(encoded) if encoder is None else max(map(len, encoded))
            if no_room(model, longest, room):
                left = f" with {room} tokens of answer" if room else ""
                raise RowRefusedError(f"too long for the model's window{left}", f"{row.where}: {longest:,} tokens.")
        except RowRefusedError as error:
            counts[error.reason] += 1
            continue
        inputs.append(encoded)
        kept.append(row)
    _require_rows(kept, counts)
    return inputs, kept, dict(counts)


def _has_adapter(model: PreTrainedModel) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)
