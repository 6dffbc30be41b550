"""The documents of a run, and the parts that they are computed in, as far as memory depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.data.parts import lane_shares, share_documents
from tunesmith.memory.estimate import PartShape

__all__ = ["Work"]

_DIVIDED = 2000  # batches that are really divided when the largest part is looked for


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be trained on, as far as memory depends on it.

    Attributes:
        batches: the documents of each micro-batch as (tokens up to the last one that is trained, trained tokens).
        evaluated: the same of each evaluation batch.
        whole: tokens of the largest micro-batch when nothing is cut.
        multiple: token axes are rounded up to it.
        padded: documents of a micro-batch and tokens of the longest, for tools that pad.
    """

    batches: Sequence[Sequence[tuple[int, int]]]
    evaluated: Sequence[Sequence[tuple[int, int]]] = ()
    whole: int = 1
    multiple: int = 1
    padded: tuple[int, int] = (1, 1)

    @property
    def tokens(self) -> int:
        """All tokens that are computed."""
        return sum(length for batch in self.batches for length, _ in batch)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max((length for batch in self.batches for length, _ in batch), default=1)

    def largest(self, most_tokens: int | None, *, of: str = "batches") -> PartShape:
        """Return the largest part of ``most_tokens``; None: the largest micro-batch."""
        batches: Sequence[Sequence[tuple[int, int]]] = getattr(self, of)
        if most_tokens is None:
            chosen = max(batches, key=lambda batch: sum(length for length, _ in batch))
            part = self._part(chosen)
            idle = max(0, self.whole - part.tokens) if of == "batches" else 0
            return PartShape((*part.lengths, idle) if idle else part.lengths, part.rows)

        def expected(batch: Sequence[tuple[int, int]]) -> float:
            total, longest = sum(length for length, _ in batch), max(length for length, _ in batch)
            return max(longest, total / -(-total // max(most_tokens, longest)))

        # The bound of a batch is cheap; only the batches that can hold the largest part are really divided.
        found: list[PartShape] = []
        for batch in sorted(batches, key=expected, reverse=True)[:_DIVIDED]:
            shares = share_documents([length for length, _ in batch], most_tokens)
            found += [self._part([batch[index] for index in share]) for share in shares]
        tokens, rows = max(part.tokens for part in found), max(part.rows for part in found)
        lengths = max(found, key=lambda part: (part.tokens, max(part.lengths))).lengths
        return PartShape(lengths, min(rows, tokens))

    def has_even_parts(self, most_tokens: int | None, lanes: int, *, width: int) -> bool:
        """Return whether some part of ``most_tokens`` would be computed in lanes; ``width``: of hidden states."""
        for batch in self.batches[:_DIVIDED]:
            lengths = [length for length, _ in batch]
            shares = [list(range(len(lengths)))] if most_tokens is None else share_documents(lengths, most_tokens)
            if any(lane_shares([lengths[index] for index in share], lanes, width=width) for share in shares):
                return True
        return False

    def _part(self, documents: Sequence[tuple[int, int]]) -> PartShape:
        lengths = [length for length, _ in documents]
        idle = -sum(lengths) % self.multiple
        return PartShape(tuple([*lengths, idle] if idle else lengths), sum(rows for _, rows in documents))
