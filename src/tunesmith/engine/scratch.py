"""Buffers that are used again by the next layer, micro-batch and step.

Fresh memory is a large cost of a training step on a CPU: the system clears every page that it hands out. A
:class:`Scratch` belongs to one engine. What it gives by name lives for one forward or backward of one layer, and is
another buffer in every thread; what it lends (:class:`Loan`) lives as long as the autograd node that keeps it.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Loan", "Scratch"]

# Bytes of a block that loans are cut from: so large that the system has it back as soon as it is dropped. What is not
# written to is not there either.
_BLOCK = 64 * 2**20
_ALIGNED = 64


class Scratch:
    """Named buffers that grow to the largest size asked for, and blocks to lend from."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str, torch.dtype, torch.device], torch.Tensor] = {}
        self._blocks = _Blocks()

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, ()  # a copy of the model starts with buffers of its own

    def __call__(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Return an uninitialized tensor of ``shape``, with the dtype and device of ``like``.

        Its values are gone as soon as this thread asks for ``name`` again.
        """
        key, size = (threading.get_ident(), name, like.dtype, like.device), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # The old one goes first, so that both never stand side by side.
            self._buffers.pop(key, None)
            buffer = None
            with torch.inference_mode(False):  # later calls may train
                buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:size].view(shape)

    def lend(self) -> Loan:
        """Return an empty loan; what is taken from it comes back when the loan is collected."""
        return Loan(self._blocks)

    def clear(self) -> None:
        """Give all memory back, what is lent as soon as it comes back."""
        self._buffers.clear()
        self._blocks = _Blocks()

    def nbytes(self) -> int:
        """Return the bytes of the named buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def blocks(self) -> tuple[int, int]:
        """Return how many blocks there are to lend from, and how many of them hold something that is lent."""
        return self._blocks.count()


class Loan:
    """Tensors lent to one node of an autograd graph. The node keeps the loan, and with it they end together."""

    def __init__(self, blocks: _Blocks) -> None:
        self._blocks = blocks
        self._taken: list[_Block] = []

    def __call__(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Return an uninitialized tensor of ``shape``, with the dtype and device of ``like``."""
        if like.device.type != "cpu":
            return like.new_empty(shape)  # the allocator of a GPU does the same, and knows its streams
        size = math.prod(shape) * like.itemsize
        block, start = self._blocks.take(size)
        self._taken.append(block)
        # .data: views share a count of in-place changes, by which autograd would take one loan for another.
        return block.memory[start : start + size].data.view(like.dtype).view(shape)

    def __del__(self) -> None:
        """Give everything back."""
        self._blocks.give_back(self._taken)


@dataclass(eq=False, slots=True)
class _Block:
    memory: torch.Tensor
    used: int = 0
    lent: int = 0


class _Blocks:
    """Blocks that are filled from front to back, and begun again when nothing of them is lent any more."""

    def __init__(self) -> None:
        self._all: list[_Block] = []
        self._current: _Block | None = None
        # Lanes share the blocks. The collector may end a loan in the middle of another call of the same thread.
        self._lock = threading.RLock()

    def take(self, size: int) -> tuple[_Block, int]:
        """Return a block and the place in it from which on ``size`` bytes are the caller's."""
        size = -(-size // _ALIGNED) * _ALIGNED
        with self._lock:
            block = self._current
            if block is None or (block.lent and block.used + size > len(block.memory)):
                block = next((b for b in self._all if not b.lent and len(b.memory) >= size), None)
            if block is None or len(block.memory) < size:
                with torch.inference_mode(False):
                    block = _Block(torch.empty(max(_BLOCK, size), dtype=torch.uint8))
                self._all.append(block)
            if not block.lent:
                block.used = 0
            self._current = block
            start = block.used
            block.used += size
            block.lent += 1
            return block, start

    def give_back(self, taken: list[_Block]) -> None:
        """Count back what one loan had."""
        with self._lock:
            for block in taken:
                block.lent -= 1

    def count(self) -> tuple[int, int]:
        """Return all blocks, and those of which something is lent."""
        with self._lock:
            return len(self._all), sum(block.lent > 0 for block in self._all)
