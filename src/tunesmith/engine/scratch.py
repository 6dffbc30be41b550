"""Buffers that live for one call and are used again by the next layer, micro-batch and step.

Fresh memory is the largest single cost of a training step on a CPU: the system clears every page that it hands out.
A :class:`Scratch` belongs to one engine; nothing in it outlives the forward or backward of one layer.
"""

from __future__ import annotations

import torch

__all__ = ["Scratch"]


class Scratch:
    """Named buffers that grow to the largest size asked for."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

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

    def clear(self) -> None:
        """Give all memory back."""
        self._buffers.clear()

    def nbytes(self) -> int:
        """Return the bytes held."""
        return sum(buffer.numel() * buffer.itemsize for buffer in self._buffers.values())
