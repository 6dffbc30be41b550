"""Buffers that are used again by the next layer, micro-batch and step.

Fresh memory is a large cost of a training step on a CPU: the system clears every page that it hands out. A
:class:`Scratch` belongs to one engine; what it gives by name lives for one forward or backward of one layer, what it
lends (:class:`Loan`) until the autograd graph that saved it is gone.
"""

from __future__ import annotations

import torch

__all__ = ["Loan", "Scratch"]

_Key = tuple[str, torch.dtype, torch.device]


class Scratch:
    """Named buffers that grow to the largest size asked for."""

    def __init__(self) -> None:
        self._buffers: dict[_Key, torch.Tensor] = {}
        self._idle: dict[_Key, list[torch.Tensor]] = {}

    def __call__(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Return an uninitialized tensor of ``shape``, with the dtype and device of ``like``.

        Its values are gone as soon as ``name`` is asked for again.
        """
        key = (name, like.dtype, like.device)
        size = 1
        for extent in shape:
            size *= extent
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
        """Return the bytes held and not lent."""
        idle = [buffer for buffers in self._idle.values() for buffer in buffers]
        return sum(buffer.nbytes for buffer in [*self._buffers.values(), *idle])


class Loan:
    """Buffers lent to one node of an autograd graph. The node keeps the loan, and with it they end together."""

    def __init__(self, idle: dict[_Key, list[torch.Tensor]]) -> None:
        self._idle = idle
        self._taken: list[tuple[_Key, torch.Tensor]] = []

    def __call__(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Return an uninitialized tensor of ``shape``, with the dtype and device of ``like``."""
        if like.device.type != "cpu":
            return like.new_empty(shape)  # the allocator of a GPU does the same, and knows its streams
        key = (name, like.dtype, like.device)
        size = 1
        for extent in shape:
            size *= extent
        idle = self._idle.setdefault(key, [])
        buffer = idle.pop() if idle else None
        if buffer is None or buffer.numel() < size:
            buffer = None  # a smaller one goes first
            buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        self._taken.append((key, buffer))
        return buffer[:size].view(shape)

    def __del__(self) -> None:
        """Give the buffers back."""
        for key, buffer in self._taken:
            self._idle.setdefault(key, []).append(buffer)
