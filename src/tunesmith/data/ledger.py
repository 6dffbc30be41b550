"""The data ledger: what came in, what is trained on, what was dropped or cut, and why. Nothing is lost uncounted.

``prepare.py`` fills it, the command line prints :meth:`Ledger.lines`, the run folder keeps :meth:`Ledger.as_dict`, and
:meth:`Ledger.check` stops a run that would teach nothing or teach a model never to stop.

Always true: ``rows_in == rows_kept + sum(dropped.values())``. A row can become several documents (one a turn), so
documents are counted apart.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tunesmith.core.errors import DataError
from tunesmith.data.packing import packing_efficiency
from tunesmith.data.types import Document, RowRefusedError

__all__ = [
    "CUT_NOTE",
    "KeptRow",
    "Ledger",
    "count_trained",
    "counted",
    "losses",
    "refuse_too_long",
    "summary",
    "wrapped",
]

CUT_NOTE = "cut to max_length"
_EXAMPLES = 3
_MOST_UNTRAINED_ENDS = 0.01
_BAR = 30
_TITLE = 12


@dataclass(frozen=True, slots=True)
class KeptRow:
    """One source row that is trained on.

    Attributes:
        documents: one or more, each with at least one trained token.
        where: the place of the row.
        has_answers: it is a conversation in which assistant turns train, so that ends of turn are checked.
        tokens_cut: tokens lost to ``on_too_long="truncate"``.
        answer_cut: some of them were to be trained.
    """

    documents: tuple[Document, ...]
    where: str
    has_answers: bool = False
    tokens_cut: int = 0
    answer_cut: bool = False

    def fingerprint(self) -> bytes:
        """Return 16 bytes that are equal for rows of equal token ids and images, whatever is trained in them."""
        digest = hashlib.blake2b(digest_size=16)
        for document in self.documents:
            digest.update(len(document).to_bytes(8, "little"))
            digest.update(document.input_ids.astype("<i4").tobytes())
            if document.images is not None:
                digest.update(document.images.digest)
        return digest.digest()


@dataclass(slots=True)
class Ledger:
    """Counts of one data set or of one side of its split; see the top of this file.

    Attributes:
        dropped: rows not trained on, by reason; ``examples`` keeps the first three places and sentences of each.
        documents_dropped: documents of kept rows that are not trained on, by reason.
        notes: what happened to documents that are trained on, by kind.
        duplicates: rows whose token ids equal an earlier row's; they are kept.
        lengths: tokens of each document, in order.
        answer_documents: documents in which an end of turn should be trained and none was cut off;
            ``untrained_ends`` of them have one that is not.
        bins, bin_capacity, packed_tokens: what packing made; ``packed_tokens`` is None where all tokens were packed.
        splits: name -> counts of each side, once the data was split.
    """

    rows_in: int = 0
    rows_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    documents_dropped: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict[str, list[tuple[str, str]]])
    rows_cut: int = 0
    tokens_cut: int = 0
    answers_cut: int = 0
    duplicates: int = 0
    notes: Counter[str] = field(default_factory=Counter[str])
    lengths: list[int] = field(default_factory=list[int])
    trained_tokens: int = 0
    answer_documents: int = 0
    untrained_ends: int = 0
    untrained_end_places: list[str] = field(default_factory=list[str])
    bins: int | None = None
    bin_capacity: int | None = None
    packed_tokens: int | None = None
    splits: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    _seen: set[bytes] = field(default_factory=set[bytes], repr=False)

    @property
    def documents(self) -> int:
        """The number of documents trained on."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """All tokens of these documents."""
        return sum(self.lengths)

    @property
    def trained_share(self) -> float:
        """Trained tokens / all tokens; 0 without tokens."""
        return self.trained_tokens / self.tokens if self.lengths else 0.0

    @property
    def packing_efficiency(self) -> float | None:
        """The share of the places in the bins that hold a token; None when nothing was packed."""
        if self.bins is None or self.bin_capacity is None:
            return None
        lengths = self.lengths if self.packed_tokens is None else [self.packed_tokens]
        return packing_efficiency(lengths, self.bins, self.bin_capacity)

    def keep(self, row: KeptRow) -> None:
        """Count a row that is trained on. ``rows_in`` is counted by whoever reads the row."""
        self.rows_kept += 1
        fingerprint = row.fingerprint()
        self.duplicates += fingerprint in self._seen
        self._seen.add(fingerprint)
        self.rows_cut += row.tokens_cut > 0
        self.tokens_cut += row.tokens_cut
        self.answers_cut += row.answer_cut
        for document in row.documents:
            self.lengths.append(len(document))
            self.trained_tokens += count_trained(document)
            self.notes.update(document.notes)
            if row.has_answers and CUT_NOTE not in document.notes:
                self._check_end_of_turn(document)

    def drop(self, where: str, reason: str, detail: str) -> None:
        """Count a row that is not trained on."""
        self.dropped[reason] += 1
        self._exemplify(reason, where, detail)

    def drop_document(self, where: str, reason: str, detail: str) -> None:
        """Count a document that is not trained on although others of its row are."""
        self.documents_dropped[reason] += 1
        self._exemplify(reason, where, detail)

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return ``(shortest, longest, documents)`` of bins that double in width: 1-16, 17-32, 33-64, ..."""
        if not self.lengths:
            return []
        edges = [0, 16]
        while edges[-1] < max(self.lengths):
            edges.append(2 * edges[-1])
        counts, _ = np.histogram(self.lengths, bins=[edge + 0.5 for edge in edges])
        bins = [(low + 1, high, int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)]
        first = next(index for index, entry in enumerate(bins) if entry[2])
        return bins[first:]

    def length_at(self, share: float) -> int:
        """Return the length that ``share`` of the documents do not exceed; 0 without documents."""
        return int(np.quantile(self.lengths, share, method="higher")) if self.lengths else 0

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "rows_in": self.rows_in,
            "rows_kept": self.rows_kept,
            "dropped": dict(self.dropped.most_common()),
            "documents_dropped": dict(self.documents_dropped.most_common()),
            "examples": {
                reason: [{"where": where, "detail": detail} for where, detail in places]
                for reason, places in self.examples.items()
            },
            "rows_cut": self.rows_cut,
            "tokens_cut": self.tokens_cut,
            "answers_cut": self.answers_cut,
            "duplicates": self.duplicates,
            "notes": dict(self.notes.most_common()),
            "documents": self.documents,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_share": self.trained_share,
            "length_median": self.length_at(0.5),
            "length_95": self.length_at(0.95),
            "length_longest": max(self.lengths, default=0),
            "length_histogram": [list(entry) for entry in self.histogram()],
            "answer_documents": self.answer_documents,
            "untrained_ends": self.untrained_ends,
            "bins": self.bins,
            "bin_capacity": self.bin_capacity,
            "packing_efficiency": self.packing_efficiency,
            "splits": self.splits,
        }

    def lines(self, width: int = 80) -> list[str]:
        """Return the ledger as plain text, every line at most ``width`` columns."""
        lines = [
            _row("rows", f"{self.rows_in:,} in, {self.rows_kept:,} kept, {sum(self.dropped.values()):,} dropped"),
            *self._dropped_lines(),
            *self._kept_lines(),
            *self._histogram_lines(width),
        ]
        return wrapped(lines, width)

    def check(self) -> None:
        """Stop where training would be in vain.

        Raises:
            DataError: nothing to train on, with the reasons; or in 1 % or more of the documents with answers an end of
                turn is not trained, so that the model would not learn to stop.
        """
        if not self.trained_tokens:
            raise DataError(f"nothing to train on: {counted(self.rows_in, 'row')} came in, none is left.{self._why()}")
        if self.untrained_ends and self.untrained_ends >= _MOST_UNTRAINED_ENDS * self.answer_documents:
            raise DataError(
                f"in {self.untrained_ends:,} of {self.answer_documents:,} documents with answers the token that ends "
                f"the assistant's turn is not trained (first: {', '.join(self.untrained_end_places)}), so the model "
                "would not learn to stop. Check that the chat template closes every assistant turn; under 1 % is "
                "tolerated."
            )

    def _why(self) -> str:
        reasons = [(reason, count, *self.examples[reason][0]) for reason, count in self.dropped.most_common(5)]
        said = "".join(f"\n  {count:,} x {reason}, first {where}: {detail}" for reason, count, where, detail in reasons)
        rest = len(self.dropped) - len(reasons)
        return said + (f"\n  and {rest} more reasons" if rest > 0 else "")

    def _exemplify(self, reason: str, where: str, detail: str) -> None:
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append((where, detail))

    def _check_end_of_turn(self, document: Document) -> None:
        self.answer_documents += 1
        if not document.end_of_turn or not document.trained[list(document.end_of_turn)].all():
            self.untrained_ends += 1
            if len(self.untrained_end_places) < _EXAMPLES:
                self.untrained_end_places.append(document.where)

    def _dropped_lines(self) -> list[str]:
        lines: list[str] = []
        for title, counter in (("dropped", self.dropped), ("", self.documents_dropped)):
            unit = "" if title else " documents of kept rows"
            for reason, count in counter.most_common(8):
                where, detail = self.examples[reason][0]
                lines.append(_row("dropped", f"{count:,}{unit} {reason}  ({where}: {detail})"))
            if len(counter) > 8:
                lines.append(_row("dropped", f"... and {len(counter) - 8} more reasons"))
        return lines

    def _kept_lines(self) -> list[str]:
        lines: list[str] = []
        if self.rows_cut:
            cut = f"{self.rows_cut:,} rows, {self.tokens_cut:,} tokens, in {self.answers_cut:,} of them the answer"
            lines.append(_row("cut", cut))
        if self.duplicates:
            lines.append(_row("duplicates", f"{self.duplicates:,} rows equal an earlier one (kept)"))
        lines.append(_row("documents", f"{self.documents:,}"))
        share = f"{self.trained_tokens:,} trained ({100 * self.trained_share:.1f} %)"
        lines.append(_row("tokens", f"{self.tokens:,}, {share}"))
        if self.answer_documents:
            trained = self.answer_documents - self.untrained_ends
            lines.append(_row("end of turn", f"trained in {trained:,} of {self.answer_documents:,} documents"))
        lines.extend(_row("note", f"{count:,} {note}") for note, count in self.notes.most_common())
        for name, counts in self.splits.items():
            lines.append(_row(name, f"{counts['rows']:,} rows, {counts['trained_tokens']:,} trained tokens"))
        efficiency = self.packing_efficiency
        if efficiency is not None:
            bins = f"{self.bins:,} bins of {self.bin_capacity:,} tokens"
            lines.append(_row("packing", f"{bins}, {100 * efficiency:.1f} % filled"))
        return lines

    def _histogram_lines(self, width: int) -> list[str]:
        if not self.lengths:
            return []
        known = f"median {self.length_at(0.5):,}, 95 % up to {self.length_at(0.95):,}, longest {max(self.lengths):,}"
        lines = [_row("lengths", known)]
        bins = self.histogram()
        most = max(count for _, _, count in bins)
        for low, high, count in bins:
            bar = "█" * -(-count * min(_BAR, width // 3) // most)
            lines.append(f"{f'{low:,}-{high:,}':>21} {bar} {count:,}")
        return lines


class _Counts(Protocol):
    """What the ledgers of all tasks have."""

    rows_in: int
    rows_cut: int
    tokens_cut: int
    dropped: Counter[str]
    examples: dict[str, list[tuple[str, str]]]


def losses(ledger: _Counts) -> str | None:
    """Return in a sentence which rows are left out or cut, and why, for those who do not print the ledger; or None."""
    said: list[str] = []
    of_kept_rows = ledger.documents_dropped if isinstance(ledger, Ledger) else Counter[str]()
    for what, counter in (("", ledger.dropped), (" documents of rows that are kept", of_kept_rows)):
        reasons = [f"{n:,} {reason} (first {ledger.examples[reason][0][0]})" for reason, n in counter.most_common(4)]
        if reasons:
            rest = ", ..." if len(counter) > 4 else ""
            said.append(f"{sum(counter.values()):,}{what} are left out: {', '.join(reasons)}{rest}")
    if ledger.rows_cut:
        said.append(f"{ledger.rows_cut:,} are cut to max_length, by {ledger.tokens_cut:,} tokens together")
    return f"of {ledger.rows_in:,} rows {'; '.join(said)}. The trainer's ledger has every reason." if said else None


def refuse_too_long(where: str, length: int, most: int, on_too_long: str) -> None:
    """Refuse a row of ``length`` tokens where ``most`` are allowed, unless it is to be cut.

    Raises:
        DataError: with ``on_too_long`` "error".
        RowRefusedError: with "drop".
    """
    too_long = f"{length:,} tokens, max_length is {most:,}"
    if on_too_long == "error":
        raise DataError(
            f"{where}: {too_long}. Raise max_length, shorten the row, or choose on_too_long=drop (leave such rows "
            "out, counted) or truncate (cut them, counted)."
        )
    if on_too_long == "drop":
        raise RowRefusedError(f"longer than {most} tokens", f"{too_long}.")


def count_trained(document: Document) -> int:
    """Return how many tokens are trained: the first never is, because nothing stands before it."""
    return int(np.count_nonzero(document.trained[1:]))


def summary(rows: Sequence[KeptRow]) -> dict[str, int]:
    """Return the counts that :attr:`Ledger.splits` holds for one side."""
    documents = [document for row in rows for document in row.documents]
    return {
        "rows": len(rows),
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "trained_tokens": sum(map(count_trained, documents)),
    }


def counted(count: int, unit: str) -> str:
    """Return ``"1 row"`` or ``"2 rows"``."""
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def wrapped(lines: Iterable[str], width: int) -> list[str]:
    """Return lines of at most ``width`` columns, what does not fit going on below the values."""
    indent = " " * _TITLE
    return [
        part for line in lines for part in textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)
    ]


def _row(title: str, text: str) -> str:
    line = f"{title:<{_TITLE}}{' '.join(text.split())}"
    # Details quote the data: whatever could move the cursor or colour the terminal is shown as a question mark.
    return "".join(character if character.isprintable() else "?" for character in line)
