"""Keys and values of the sequences that are being answered: one slot a sequence, all slots in one tensor a layer.

Sequences hold the slots 0 to n-1 without gaps, so that those of a step are a view and nothing is gathered. The tensors
grow with the longest sequence and the number of sequences, and are given back when nothing is being answered.
"""

from __future__ import annotations

import torch

__all__ = ["SlotCache"]

_BLOCK = 256


class SlotCache:
    """Keys and values (slots, Hkv, capacity, d) of every layer.

    Args:
        layers: number of attention layers.
        heads: key-value heads, Hkv.
        width: elements of a head, d.
    """

    def __init__(self, layers: int, heads: int, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        empty = torch.empty(0, heads, 0, width, dtype=dtype, device=device)
        self.keys = [empty] * layers
        self.values = [empty] * layers

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in all layers."""
        _, heads, _, width = self.keys[0].shape
        return 2 * len(self.keys) * heads * width * self.keys[0].element_size()

    def reserve(self, slots: int, length: int) -> None:
        """Make room for ``slots`` sequences of ``length`` tokens; what is held stays."""
        has_slots, _, has_length, _ = self.keys[0].shape
        if slots <= has_slots and length <= has_length:
            return
        # By a quarter at least: growing copies everything.
        slots = slots if slots <= has_slots else max(slots, has_slots + has_slots // 4)
        if length > has_length:
            length = -(-max(length, has_length + has_length // 4) // _BLOCK) * _BLOCK
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(max(slots, has_slots), old.shape[1], max(length, has_length), old.shape[3])
                new[:has_slots, :, :has_length] = old
                tensors[layer] = new

    def move(self, source: int, target: int, length: int) -> None:
        """Move the first ``length`` tokens of one slot to another."""
        for tensors in (self.keys, self.values):
            for held in tensors:
                held[target, :, :length] = held[source, :, :length]
        self.forget(source)

    def forget(self, slot: int) -> None:
        """Zero the values of a slot: who holds it next gives them no weight, but zero times infinity is NaN."""
        for held in self.values:
            held[slot] = 0

    def clear(self) -> None:
        """Give the memory back."""
        for tensors in (self.keys, self.values):
            tensors[:] = [held.new_empty(0, held.shape[1], 0, held.shape[3]) for held in tensors]
