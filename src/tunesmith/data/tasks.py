"""Rows of a task as a model takes them: token ids, labels, and what an answer is compared with.

    Record ──> TaskRow(features, reference) ──> batches (training/tasks/recipes.py)

One function a task. What they share: nothing is padded or cut here without being asked for, and every row that is left
out or cut is counted in the :class:`TaskLedger`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tunesmith.core.errors import DataError, ModelError
from tunesmith.data.ledger import counted, refuse_too_long, wrapped
from tunesmith.data.prepare import split_rows
from tunesmith.data.task_rows import Record, answers_of, label_number
from tunesmith.data.types import RowRefusedError

__all__ = ["IGNORED", "TaskData", "TaskLedger", "TaskRow", "prepare_records", "split_task_rows"]

IGNORED = -100
"""The label of a token that is not trained, as in torch's cross entropy."""
_EXAMPLES = 3

OnTooLong = Literal["drop", "error", "truncate"]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One row.

    Attributes:
        features: ``input_ids`` and what else the tokenizer gives, and ``labels``; for FEATURE_EXTRACTION the same for
            ``anchor``, ``positive`` and, where the row has one, ``negative``.
        where: the place that it came from.
        reference: what a prediction is compared with, where labels do not say it: a text, or for QUESTION_ANS the
            context, the places of its tokens and the right answers.
    """

    features: dict[str, Any]
    where: str
    reference: Any = None

    def fingerprint(self) -> bytes:
        """Return 16 bytes that are equal for rows of equal token ids, whatever their labels are."""
        ids = [self.features[name] for name in sorted(self.features) if name not in ("labels", "token_type_ids")]
        return hashlib.blake2b(json.dumps(ids).encode(), digest_size=16).digest()


@dataclass(slots=True)
class TaskLedger:
    """What came in, what is trained on, what was left out or cut, and why.

    Always true: ``rows_in == rows_kept + sum(dropped.values())``. ``examples`` keeps the first three places and
    sentences of each reason; ``labels`` counts rows, or words, by label; ``lengths`` are tokens a row.
    """

    rows_in: int = 0
    rows_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict[str, list[tuple[str, str]]])
    notes: Counter[str] = field(default_factory=Counter[str])
    rows_cut: int = 0
    tokens_cut: int = 0
    lengths: list[int] = field(default_factory=list[int])
    labels: Counter[str] = field(default_factory=Counter[str])
    splits: dict[str, int] = field(default_factory=dict[str, int])

    def drop(self, where: str, reason: str, detail: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append((where, detail))

    def check(self) -> None:
        """Raise :class:`DataError` where no row is left."""
        if not self.rows_kept:
            why = "".join(
                f"\n  {count:,} x {reason}, first {self.examples[reason][0][0]}: {self.examples[reason][0][1]}"
                for reason, count in self.dropped.most_common(5)
            )
            raise DataError(f"nothing to train on: {counted(self.rows_in, 'row')} came in, none is left.{why}")

    def length_at(self, share: float) -> int:
        """Return the length that ``share`` of the rows do not exceed; 0 without rows."""
        return int(np.quantile(self.lengths, share, method="higher")) if self.lengths else 0

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "rows_in": self.rows_in,
            "rows_kept": self.rows_kept,
            "dropped": dict(self.dropped.most_common()),
            "examples": {
                reason: [{"where": where, "detail": detail} for where, detail in places]
                for reason, places in self.examples.items()
            },
            "notes": dict(self.notes.most_common()),
            "rows_cut": self.rows_cut,
            "tokens_cut": self.tokens_cut,
            "tokens": sum(self.lengths),
            "length_median": self.length_at(0.5),
            "length_95": self.length_at(0.95),
            "length_longest": max(self.lengths, default=0),
            "labels": dict(self.labels.most_common()),
            "splits": self.splits,
        }

    def lines(self, width: int = 80) -> list[str]:
        """Return the ledger as plain text, every line at most ``width`` columns."""
        counts = f"{self.rows_in:,} in, {self.rows_kept:,} kept, {sum(self.dropped.values()):,} dropped"
        rows = [("rows", counts)]
        for reason, count in self.dropped.most_common(8):
            where, detail = self.examples[reason][0]
            rows.append(("dropped", f"{count:,} {reason}  ({where}: {detail})"))
        if self.rows_cut:
            rows.append(("cut", f"{self.rows_cut:,} rows, {self.tokens_cut:,} tokens"))
        if self.labels:
            shown = ", ".join(f"{name} {count:,}" for name, count in self.labels.most_common(8))
            rows.append(("labels", f"{len(self.labels):,}: {shown}{', ...' if len(self.labels) > 8 else ''}"))
        rows += [("note", f"{count:,} x {note}") for note, count in self.notes.most_common()]
        rows += [(name, f"{count:,} rows") for name, count in self.splits.items()]
        longest = max(self.lengths, default=0)
        known = f"median {self.length_at(0.5):,}, 95 % up to {self.length_at(0.95):,}, longest {longest:,} tokens"
        return wrapped([_printable(f"{title:<12}{text}") for title, text in [*rows, ("lengths", known)]], width)


def _printable(line: str) -> str:
    """Replace what could move the cursor or colour the terminal: details quote the data."""
    return "".join(character if character.isprintable() else "?" for character in line)


@dataclass(slots=True)
class TaskData:
    """Rows of a task, a map-style dataset, and what happened to them on the way."""

    rows: list[TaskRow]
    ledger: TaskLedger

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> TaskRow:
        """Return one row."""
        return self.rows[index]

    def fingerprint(self) -> str:
        """Return a hash of all that is trained on."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            digest.update(json.dumps(row.features, sort_keys=True).encode())
        return digest.hexdigest()


def prepare_records(
    records: Iterable[Record],
    task: str,
    tokenizer: Any,
    *,
    labels: Sequence[str] = (),
    max_length: int,
    on_too_long: OnTooLong = "drop",
) -> TaskData:
    """Return ``records`` of ``task`` as rows of token ids, none longer than ``max_length``.

    ``labels`` are those of the model, in the order of their numbers. ``on_too_long``: "drop" leaves a row out and
    counts it, "truncate" cuts and counts it, "error" stops.

    Raises:
        DataError: a label that the model does not know, tags and words of different number, an answer that does not
            stand in its context, or a row that is too long where that is an error.
        ModelError: the tokenizer does not say where its tokens begin and end, which tags and answers need.
    """
    if task in ("TOKEN_CLS", "QUESTION_ANS") and not tokenizer.is_fast:
        raise ModelError(f"{task} needs a tokenizer with offsets (a fast one); {type(tokenizer).__name__} has none.")
    ledger = TaskLedger()
    maker = _Maker(tokenizer, tuple(labels), max_length, on_too_long, ledger)
    make = {
        "SEQ_CLS": maker.classified,
        "TOKEN_CLS": maker.tagged,
        "SEQ_2_SEQ_LM": maker.translated,
        "QUESTION_ANS": maker.answered,
        "FEATURE_EXTRACTION": maker.paired,
    }[task]
    rows: list[TaskRow] = []
    for record in records:
        ledger.rows_in += 1
        cut = ledger.tokens_cut
        try:
            rows.append(make(record))
        except RowRefusedError as refusal:
            ledger.drop(record.where, refusal.reason, str(refusal))
            ledger.tokens_cut = cut
            continue
        ledger.rows_kept += 1
        ledger.rows_cut += ledger.tokens_cut > cut
    return TaskData(rows, ledger)


def split_task_rows(data: TaskData, *, fraction: float, seed: int) -> tuple[TaskData, TaskData | None]:
    """Set rows apart for evaluation, equal ones together; see :func:`tunesmith.data.prepare.split_rows`.

    The training side keeps the ledger of the whole source: only it knows what was dropped before the split.
    """
    train, held_out = split_rows([row.fingerprint() for row in data.rows], fraction=fraction, seed=seed)
    if not held_out:
        return data, None
    data.ledger.splits = {"train": len(train), "eval": len(held_out)}
    kept = [data.rows[index] for index in held_out]
    ledger = TaskLedger(rows_in=len(kept), rows_kept=len(kept), lengths=[data.ledger.lengths[i] for i in held_out])
    return TaskData([data.rows[index] for index in train], data.ledger), TaskData(kept, ledger)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Turns one record into a row; one method a task."""

    tokenizer: Any
    labels: tuple[str, ...]
    max_length: int
    on_too_long: OnTooLong
    ledger: TaskLedger

    def classified(self, record: Record) -> TaskRow:
        number = label_number(record.value["label"], self.labels, record.where)
        encoded = self._encode(record.where, record.value["text"], record.value.get("text_pair"))
        self._count(len(encoded["input_ids"]))
        self.ledger.labels[self.labels[number]] += 1
        return TaskRow({**_inputs(encoded), "labels": number}, record.where)

    def tagged(self, record: Record) -> TaskRow:
        """The first piece of a word carries its tag, the others carry none; words are joined by spaces."""
        words, tags = record.value["tokens"], record.value["tags"]
        if len(words) != len(tags):
            raise DataError(f"{record.where}: {len(words)} words and {len(tags)} tags. Each word needs one tag.")
        numbers = [label_number(tag, self.labels, record.where) for tag in tags]
        cut_before = self.ledger.tokens_cut
        encoded = self._encode(record.where, " ".join(words), offsets=True)
        owners = [word for word, text in enumerate(words) for _ in f"{text} "]  # of every character, and of its space
        pieces = [IGNORED] * len(encoded["input_ids"])
        seen: set[int] = set()
        for piece, (first, last) in enumerate(encoded["offset_mapping"]):
            word = owners[last - 1] if last > first else -1
            if word >= 0 and word not in seen:
                seen.add(word)
                pieces[piece] = numbers[word]
        if not seen:
            raise RowRefusedError("no word is a token", "no word of this row has a token of its own.")
        lost = (max(seen) + 1 if self.ledger.tokens_cut > cut_before else len(words)) - len(seen)
        if lost:
            self.ledger.notes["word without a token of its own, so without its tag"] += lost
        self._count(len(pieces))
        self.ledger.labels.update(self.labels[number] for number in pieces if number != IGNORED)
        return TaskRow({**_inputs(encoded), "labels": pieces}, record.where)

    def translated(self, record: Record) -> TaskRow:
        """The target ends with the end-of-text token, as that is how generation stops."""
        encoded = self._encode(record.where, record.value["source"])
        target = self._encode(record.where, record.value["target"], is_target=True)["input_ids"]
        self._count(len(encoded["input_ids"]))
        return TaskRow({**_inputs(encoded), "labels": target}, record.where, record.value["target"])

    def answered(self, record: Record) -> TaskRow:
        """Labels are the first and the last token of the answer in the context; both 0 where there is none."""
        context, answers = record.value["context"], answers_of(record)
        cut_before = self.ledger.tokens_cut
        encoded = self._encode(record.where, record.value["question"], context, offsets=True)
        sides = encoded.sequence_ids()
        spans = [tuple(at) if side == 1 else None for at, side in zip(encoded["offset_mapping"], sides, strict=True)]
        first = last = 0
        if answers:
            start, end = self._place(record.where, context, *answers[0])
            end = start + len(context[start:end].rstrip())  # a space before what follows belongs to no token of it
            inside = [i for i, span in enumerate(spans) if span is not None and span[0] < end and span[1] > start]
            if not inside or spans[inside[-1]][1] < end:  # type: ignore[index]
                seen = max((span[1] for span in spans if span is not None), default=0)
                if self.ledger.tokens_cut > cut_before and seen < end:
                    raise RowRefusedError("answer cut off", f"the answer ends after {self.max_length} tokens.")
                shown = repr(answers[0][0][:60])
                raise RowRefusedError(
                    "answer without a token of its own",
                    f"the tokenizer makes no token of the answer {shown}, or its end.",
                )
            first, last = inside[0], inside[-1]
        self._count(len(spans))
        reference = {"context": context, "spans": spans, "answers": [text for text, _ in answers] or [""]}
        return TaskRow({**_inputs(encoded), "labels": [first, last]}, record.where, reference)

    def paired(self, record: Record) -> TaskRow:
        sides = {name: _inputs(self._encode(record.where, text)) for name, text in record.value.items()}
        self._count(max(len(side["input_ids"]) for side in sides.values()))
        return TaskRow(sides, record.where, record.value["positive"])

    def _place(self, where: str, context: str, answer: str, start: int | None) -> tuple[int, int]:
        if start is None:
            start = context.find(answer)
            if context.count(answer) > 1:
                self.ledger.notes["answer that stands in its context more than once: the first place is trained"] += 1
        if start < 0 or context[start : start + len(answer)] != answer:
            place = "" if start < 0 else f" at character {start}"
            raise DataError(f"{where}: the answer {answer[:60]!r} does not stand in the context{place}.")
        return start, start + len(answer)

    def _count(self, length: int) -> None:
        self.ledger.lengths.append(length)

    def _encode(
        self, where: str, text: str, pair: str | None = None, *, offsets: bool = False, is_target: bool = False
    ) -> Any:
        def run(**cut: Any) -> Any:
            texts = {"text_target": text} if is_target else {"text": text, "text_pair": pair}
            return self.tokenizer(**texts, verbose=False, return_offsets_mapping=offsets, **cut)

        encoded = run(truncation=False)
        end = self._missing_end(encoded["input_ids"]) if is_target else []
        length = len(encoded["input_ids"]) + len(end)
        if length > self.max_length:
            refuse_too_long(where, length, self.max_length, self.on_too_long)
            is_question = offsets and pair is not None  # of a question and its context the context is cut
            if is_question and sum(side != 1 for side in encoded.sequence_ids()) >= self.max_length:
                reason = f"question longer than {self.max_length} tokens"
                raise RowRefusedError(reason, "the question alone leaves no token for its context.")
            encoded = run(truncation="only_second" if is_question else True, max_length=self.max_length - len(end))
            self.ledger.tokens_cut += length - len(encoded["input_ids"]) - len(end)
        encoded["input_ids"] += end
        return encoded

    def _missing_end(self, ids: Sequence[int]) -> list[int]:
        """Return the end-of-text token, unless it is among the special tokens that end ``ids`` (mBART: </s> en_XX)."""
        eos, specials = self.tokenizer.eos_token_id, set(self.tokenizer.all_special_ids)
        ending = set(itertools.takewhile(specials.__contains__, reversed(ids)))
        return [] if eos is None or eos in ending else [eos]


def _inputs(encoded: Any) -> dict[str, list[int]]:
    """Return what a model reads; which tokens are padding is known by lengths, never by an id."""
    return {name: list(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded}
