"""Rows of a source -> documents to train on, with every row accounted for.

    read_rows -> to_example -> encoder.encode -> too long? anything trained? -> KeptRow or a reason in the ledger

then, where wanted, :func:`split_documents` (train and eval), and :class:`DocumentDataset` or :class:`PackedDataset`,
which are what a ``DataLoader`` with :class:`~tunesmith.data.collate.DocumentCollator` reads. The model is not needed;
the tokenizer comes in through the encoder.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Protocol, get_args

import numpy as np

from tunesmith.core.errors import SettingsError
from tunesmith.core.names import did_you_mean
from tunesmith.data.collate import IGNORED
from tunesmith.data.files import Source, read_rows
from tunesmith.data.formats import check_mapping, to_example
from tunesmith.data.ledger import CUT_NOTE, KeptRow, Ledger, count_trained, refuse_too_long, summary
from tunesmith.data.packing import pack_best_fit
from tunesmith.data.types import Conversation, Document, Example, RowRefusedError

__all__ = [
    "DocumentDataset",
    "Encoder",
    "OnTooLong",
    "PackedDataset",
    "PreparedData",
    "prepare",
    "split_documents",
    "split_rows",
]

OnTooLong = Literal["drop", "error", "truncate"]
_FEWEST_TO_SPLIT = 20


class Encoder(Protocol):
    """What turns an example into token ids with their trained positions."""

    def encode(self, example: Example) -> list[Document]:
        """Return one or more documents, or raise :class:`RowRefusedError`."""
        ...


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Rows to train on and the ledger that counts them."""

    rows: list[KeptRow]
    ledger: Ledger

    @property
    def documents(self) -> list[Document]:
        """All documents, in the order of their rows."""
        return [document for row in self.rows for document in row.documents]

    def fingerprint(self) -> str:
        """Return a hash of all token ids and trained positions, in order: equal only for equal training data."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            digest.update(row.fingerprint())
            for document in row.documents:
                digest.update(np.packbits(document.trained).tobytes())
        return digest.hexdigest()


def prepare(
    source: Source,
    encoder: Encoder,
    *,
    max_length: int,
    on_too_long: OnTooLong = "drop",
    mapping: Mapping[str, str] | None = None,
    split: str = "train",
    name: str | None = None,
    limit: int | None = None,
    most_tokens: int | None = None,
) -> PreparedData:
    """Read, understand and encode a source; refuse nothing in silence.

    Rows that cannot be used are dropped and counted by reason. What stops everything is a source that cannot be read,
    not a row. Call ``.ledger.check()`` before training on the result.

    Args:
        source, split, name: as in :func:`~tunesmith.data.files.read_rows`.
        encoder: see :class:`Encoder`.
        max_length: most tokens of a document, at least 2.
        on_too_long: ``"drop"`` the document, counted; ``"error"``; or ``"truncate"`` to its first ``max_length``
            tokens, counted, dropped if nothing trained is left or if it has images, which are never cut through.
        mapping: as in :func:`~tunesmith.data.formats.to_example`.
        limit: read only the first ``limit`` rows.
        most_tokens: read no further row once those that are kept have this many tokens.

    Raises:
        DataError: the source or the mapping is wrong, or a document is too long under ``"error"``.
        SettingsError: ``on_too_long``, ``max_length`` or ``limit`` has no valid value.
    """
    _check_settings(max_length, on_too_long, limit)
    if mapping is not None:
        check_mapping(mapping)
    ledger = Ledger()
    rows: list[KeptRow] = []
    fit = _Fitter(max_length, on_too_long, ledger)
    tokens = 0
    for source_row in islice(read_rows(source, split=split, name=name), limit):
        ledger.rows_in += 1
        try:
            example = to_example(source_row, mapping)
            row = fit(encoder.encode(example), source_row.where, _has_answers(example))
        except RowRefusedError as refusal:
            ledger.drop(source_row.where, refusal.reason, str(refusal))
        else:
            ledger.keep(row)
            rows.append(row)
            tokens += sum(map(len, row.documents))
        if most_tokens is not None and tokens >= most_tokens:
            break
    return PreparedData(rows, ledger)


def split_documents(
    data: PreparedData, *, fraction: float = 0.05, most: int = 500, seed: int = 3407
) -> tuple[PreparedData, PreparedData | None]:
    """Set rows apart for evaluation; documents of one row, and rows of equal tokens, stay on one side.

    Each side has a ledger of its own rows; ``data.ledger`` gets the sizes of both, or a note saying why nothing was
    set apart (the second value is then None). Arguments as in :func:`split_rows`.
    """
    fingerprints = [row.fingerprint() for row in data.rows]
    train, held_out = split_rows(fingerprints, fraction=fraction, most=most, seed=seed)
    if not held_out:
        if fraction:
            few = len(data.rows) < _FEWEST_TO_SPLIT
            why = f"fewer than {_FEWEST_TO_SPLIT} rows" if few else "all rows are equal"
            data.ledger.notes[f"no eval split: {why}"] += 1
        return data, None
    sides = [_subset(data.rows, train), _subset(data.rows, held_out)]
    data.ledger.splits = {name: summary(side.rows) for name, side in zip(("train", "eval"), sides, strict=True)}
    return sides[0], sides[1]


def split_rows(
    fingerprints: Sequence[bytes], *, fraction: float = 0.05, most: int = 500, seed: int = 3407
) -> tuple[list[int], list[int]]:
    """Return the indices of the rows to train on and of those to evaluate on, each ascending.

    ``fraction`` of the rows, at least 1 and at most ``most``, are set apart; none when there are fewer than 20 rows,
    when ``fraction`` is 0, or when all rows are equal. Rows of equal fingerprint stay together, so that nothing
    evaluated was trained on. The same fingerprints, numbers and seed give the same split.

    Raises:
        SettingsError: ``fraction`` is not in [0, 1), or ``most`` is below 1.
    """
    if not 0 <= fraction < 1:
        raise SettingsError(f"eval_split={fraction} must be 0 (none) or a fraction below 1, such as 0.05.")
    if most < 1:
        raise SettingsError(f"most={most} evaluation rows: must be at least 1. Use eval_split=0 for none.")
    total = len(fingerprints)
    everything = list(range(total))
    groups: dict[bytes, list[int]] = {}
    for index, fingerprint in enumerate(fingerprints):
        groups.setdefault(fingerprint, []).append(index)
    if total < _FEWEST_TO_SPLIT or fraction == 0 or len(groups) < 2:
        return everything, []
    wanted = min(most, max(1, round(fraction * total)), total - 1)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    held_out: list[int] = []
    for group in order:
        if len(held_out) + len(group) <= wanted:
            held_out.extend(group)
    if not held_out:  # every row has duplicates: take the smallest group, although it is more than was asked for
        held_out = min(order, key=len)
    chosen = set(held_out)
    return [index for index in everything if index not in chosen], sorted(held_out)


class DocumentDataset:
    """A map-style dataset, one document an item: the features that ``DocumentCollator`` takes."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents
        self.lengths = [len(document) for document in documents]

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``{"input_ids", "labels", "lengths", "where", "images"}`` of one document."""
        return _feature([self.documents[index]])


class PackedDataset:
    """A map-style dataset, one bin an item: whole documents, best-fit, at most ``capacity`` tokens together.

    ``lengths`` are the tokens of each bin. Pass ``ledger`` to have bins and efficiency counted there.
    """

    def __init__(self, documents: Sequence[Document], capacity: int, *, ledger: Ledger | None = None) -> None:
        self.documents = documents
        sizes = [len(document) for document in documents]
        self.bins = pack_best_fit(sizes, capacity)
        self.lengths = [sum(sizes[index] for index in members) for members in self.bins]
        if ledger is not None:
            # After a split the ledger also counts rows that are not packed.
            ledger.bins, ledger.bin_capacity, ledger.packed_tokens = len(self.bins), capacity, sum(sizes)

    def __len__(self) -> int:
        """Return the number of bins."""
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``{"input_ids", "labels", "lengths", "where", "images"}`` of one bin."""
        return _feature([self.documents[member] for member in self.bins[index]])


@dataclass(frozen=True, slots=True)
class _Fitter:
    """Applies ``on_too_long`` to the documents of one row and leaves out those that train nothing."""

    max_length: int
    on_too_long: OnTooLong
    ledger: Ledger

    def __call__(self, documents: Sequence[Document], where: str, has_answers: bool) -> KeptRow:
        """Return the row as it is kept, or refuse it with the reason of its last document."""
        kept: list[Document] = []
        lost: list[RowRefusedError] = []
        tokens_cut, answer_cut = 0, False
        for document in documents:
            try:
                fitted = self._fit(document)
            except RowRefusedError as refusal:
                lost.append(refusal)
                continue
            kept.append(fitted)
            tokens_cut += len(document) - len(fitted)
            answer_cut |= count_trained(fitted) < count_trained(document)
        if not kept:
            raise lost[-1] if lost else _nothing_trained()
        for refusal in lost:
            self.ledger.drop_document(where, refusal.reason, str(refusal))
        return KeptRow(tuple(kept), where, has_answers, tokens_cut, answer_cut)

    def _fit(self, document: Document) -> Document:
        if not count_trained(document):
            raise _nothing_trained()
        if len(document) <= self.max_length:
            return document
        refuse_too_long(document.where, len(document), self.max_length, self.on_too_long)
        too_long = f"{len(document):,} tokens, max_length is {self.max_length:,}"
        if document.images is not None:
            raise RowRefusedError(
                f"longer than {self.max_length} tokens, with images", f"{too_long}; a row with images is never cut."
            )
        cut = _truncate(document, self.max_length)
        if not count_trained(cut):
            raise RowRefusedError("nothing trained after truncation", f"{too_long}; all that trains comes after that.")
        return cut


def _truncate(document: Document, length: int) -> Document:
    return replace(
        document,
        input_ids=document.input_ids[:length],
        trained=document.trained[:length],
        end_of_turn=tuple(position for position in document.end_of_turn if position < length),
        notes=(*document.notes, CUT_NOTE),
    )


def _nothing_trained() -> RowRefusedError:
    return RowRefusedError("nothing to train on", "no token of this row is to be trained.")


def _has_answers(example: Example) -> bool:
    if not isinstance(example, Conversation):
        return False
    turns = zip(example.messages, example.train, strict=True)
    return any(message["role"] == "assistant" and flag is not False for message, flag in turns)


def _subset(rows: Sequence[KeptRow], indices: Sequence[int]) -> PreparedData:
    chosen = [rows[index] for index in indices]
    ledger = Ledger(rows_in=len(chosen))
    for row in chosen:
        ledger.keep(row)
    return PreparedData(chosen, ledger)


def _feature(documents: Sequence[Document]) -> dict[str, Any]:
    ids = np.concatenate([document.input_ids for document in documents])
    trained = np.concatenate([document.trained for document in documents])
    return {
        "input_ids": ids,
        "labels": np.where(trained, ids, np.int32(IGNORED)),
        "lengths": [len(document) for document in documents],
        "where": [document.where for document in documents],
        "images": [document.images for document in documents],
    }


def _check_settings(max_length: int, on_too_long: str, limit: int | None) -> None:
    choices = get_args(OnTooLong)
    if on_too_long not in choices:
        near = did_you_mean(str(on_too_long), choices)
        raise SettingsError(f"on_too_long={on_too_long!r} must be one of {', '.join(choices)}.{near}")
    if max_length < 2:
        raise SettingsError(f"max_length={max_length} must be at least 2: one token to read and one to predict.")
    if limit is not None and limit < 1:
        raise SettingsError(f"limit={limit} must be at least 1 row, or None for all.")
