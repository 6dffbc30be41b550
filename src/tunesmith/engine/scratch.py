"""Buffers that are used again by the next layer, micro-batch and step.

Fresh memory is a large cost of a training step on a CPU: the system clears every page that it hands out. A
:class:`Scratch` belongs to one engine. What it gives by name lives for one forward or backward of one layer, and is
another buffer in every thread; what it lends (:class:`Loan`) lives as long as the autograd node that keeps it.
"""

from __future__ import annotations

import math
import threading

import torch

__all__ = ["Loan", "Scratch"]

_Key = tuple[str, torch.dtype, torch.device]


class Scratch:
    """Named buffers that grow to the largest size asked for."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, _Key], torch.Tensor] = {}
        self._idle: dict[_Key, list[torch.Tensor]] = {}

    def __call__(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Return an uninitialized tensor of ``shape``, with the dtype and device of ``like``.

        Its values are gone as soon as this thread asks for ``name`` again.
        """
        key, size = (threading.get_ident(), (name, like.dtype, like.device)), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # The old one goes first, so that both never stand side by side.
            self._buffers.pop(key, None)
            buffer = None
            buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:size].view(shape)

    def lend(self) -> Loan:
        """Return an empty loan; what is taken from it comes back when the loan is collected."""
        return Loan(self._idle)

    def clear(self) -> None:
        """Give all memory back that is not lent."""
        self._buffers.clear()
        self._idle.clear()

    def nbytes(self) -> int:
        """Return the bytes of the named buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def idle_nbytes(self) -> int:
        """Return the bytes that can be lent without new memory."""
        return sum(buffer.nbytes for buffers in self._idle.values() for buffer in buffers)


class Loan:
    """Buffers lent to one node of an autograd graph. The node keeps the loan, and with it they end together."""

    def __init__(self, idle: dict[_Key, list[torch.Tensor]]) -> None:
        self._idle = idle
        self._taken: list[tuple[_Key, torch.Tensor]] = []

    def __call__(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Return an uninitialized tensor of ``shape``, with the dtype and device of ``like``."""
        if like.device.type != "cpu":
            return like.new_empty(shape)  # the allocator of a GPU does the same, and knows its streams
        key, size = (name, like.dtype, like.device), math.prod(shape)
        buffer = _pop(self._idle.get(key, []))
        if buffer is None or buffer.numel() < size:
            buffer = None  # a smaller one goes first
            buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        self._taken.append((key, buffer))
        return buffer[:size].view(shape)

    def __del__(self) -> None:
        """Give the buffers back."""
        for key, buffer in self._taken:
            self._idle.setdefault(key, []).append(buffer)


def _pop(buffers: list[torch.Tensor]) -> torch.Tensor | None:
    # Not "if buffers": another thread may take the last one in between.
    try:
        return buffers.pop()
    except IndexError:
        return None
