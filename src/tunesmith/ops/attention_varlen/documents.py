"""Where documents lie on a token axis: their lengths on the host, or bounds that kernels read on the device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

__all__ = ["Documents", "Lengths", "bounds_of", "host_lengths"]


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Documents whose bounds are on the device already.

    Attributes:
        bounds: (D + 1,) int32, where documents begin, and T. Equal neighbours are documents without tokens.
        longest: no document has more tokens.
        lengths: of the documents; None where the host does not know them, because what lies in ``bounds`` changes
            between the runs of one recording (``engine/graphs.py``).
    """

    bounds: torch.Tensor
    longest: int
    lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Return the number of documents, those without tokens included."""
        return len(self.bounds) - 1


Lengths = tuple[int, ...] | Documents
"""What the primitives take: lengths of documents that sum to T, or their bounds."""


def host_lengths(documents: Lengths) -> tuple[int, ...]:
    """Return the lengths on the host; where they are on a device only, this waits for it."""
    if not isinstance(documents, Documents):
        return documents
    return tuple(documents.bounds.diff().tolist()) if documents.lengths is None else documents.lengths


def bounds_of(documents: Lengths, device: torch.device) -> tuple[torch.Tensor, int]:
    """Return the bounds, int32 on ``device``, and the longest length; from lengths alone a copy to the device."""
    if isinstance(documents, Documents):
        return documents.bounds.to(device), documents.longest
    present = [length for length in documents if length]
    return torch.tensor([0, *accumulate(present)], dtype=torch.int32, device=device), max(present)
