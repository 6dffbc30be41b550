"""Batches of documents: shuffled by (seed, epoch), cut into equal shares for the processes, nothing repeated.

Every process sees the same order and takes its slice of each global batch, so that two processes with batch b train on
the same documents per step as one process with batch 2b. Where the last global batch has too few documents for all,
a process gets one document with nothing trained: its gradients are zero and no process waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from tunesmith.data.collate import IGNORED, DocumentCollator

__all__ = ["JOINED", "DocumentBatches", "DocumentLoader"]

_NOTHING_TRAINED = -1
# Token axes are rounded up to 64. A kernel per new shape costs a CPU more than 32 idle tokens a micro-batch.
JOINED = DocumentCollator(64)


class DocumentBatches(Sampler[list[int]]):
    """Indices of the micro-batches of one process; ``set_epoch`` chooses the order."""

    def __init__(
        self, count: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, processes: int = 1
    ) -> None:
        self._count, self._batch_size, self._shuffle, self._seed = count, batch_size, shuffle, seed
        self._rank, self._processes = rank, processes
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of ``epoch``."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of micro-batches of one epoch, equal on every process."""
        return -(-self._count // (self._batch_size * self._processes))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each micro-batch; -1 stands for a document with nothing trained."""
        order: list[int] = list(range(self._count))
        if self._shuffle:
            order = np.random.default_rng((self._seed, self._epoch)).permutation(self._count).tolist()
        together = self._batch_size * self._processes
        for start in range(0, self._count, together):
            mine = start + self._rank * self._batch_size
            yield order[mine : min(mine + self._batch_size, start + together)] or [_NOTHING_TRAINED]


class DocumentLoader(DataLoader[Any]):
    """A DataLoader over documents or packed bins; ``join`` makes a batch of each micro-batch's features."""

    def __init__(
        self,
        dataset: Any,
        batches: DocumentBatches,
        join: Callable[[Sequence[Any]], dict[str, Any]] = JOINED,
        *,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(_WithEmpty(dataset), batch_sampler=batches, collate_fn=join, pin_memory=pin_memory)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of ``epoch``; transformers' Trainer calls this."""
        assert isinstance(self.batch_sampler, DocumentBatches)
        self.batch_sampler.set_epoch(epoch)


class _WithEmpty(torch.utils.data.Dataset[Any]):
    """A dataset whose index -1 is its first document with all labels ignored."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != _NOTHING_TRAINED:
            return self._dataset[index]
        first = self._dataset[0]
        return {**first, "labels": np.full_like(first["labels"], IGNORED)}
