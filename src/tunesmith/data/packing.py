"""Best-fit-decreasing bin packing of whole documents.

Documents are placed longest first, each into the fullest bin that still has room, else into a new one. Best-fit
decreasing needs at most 11/9 of the optimal number of bins, plus a constant (Johnson et al. 1974, SIAM J. Comput. 3,
299-325). A document is never split, so packing changes no training signal.

Finding "the smallest remaining room that is at least x" is a lookup in a bitmap tree over room sizes, so the whole
takes O(n log n + n log capacity) time and O(capacity) memory, whatever the number of open bins.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.errors import DataError

__all__ = ["pack_best_fit", "packing_efficiency"]


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of indices into ``lengths``; the lengths of one bin sum to at most ``capacity``.

    Deterministic: equal lengths keep their order. Every index stands in exactly one bin.

    Raises:
        DataError: a length is below 1 or above ``capacity`` (the caller has applied ``on_too_long`` before).
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise DataError(f"document {index} has {length} tokens, a bin takes 1 to {capacity}. Drop or cut it first.")
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room -> bins that have exactly this room left
    rooms = _SortedSet(capacity + 1)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        room = rooms.at_least(length)
        if room is None:
            chosen, left = len(bins), capacity - length
            bins.append([])
        else:
            chosen, left = with_room[room].pop(), room - length
            if not with_room[room]:
                rooms.remove(room)
        bins[chosen].append(index)
        with_room[left].append(chosen)
        rooms.add(left)
    return bins


def packing_efficiency(lengths: Sequence[int], bins: int, capacity: int) -> float:
    """Return the share of ``bins * capacity`` places that hold a token; 1.0 for no bins."""
    return sum(lengths) / (bins * capacity) if bins else 1.0


class _SortedSet:
    """A set of integers below ``size`` that finds the smallest member at or above a number in O(log size).

    A complete binary tree in one byte array: leaf ``i`` is at ``width + i``, and a node is 1 when a leaf below it is.
    """

    def __init__(self, size: int) -> None:
        self._width = 1 << max(0, size - 1).bit_length()
        self._tree = bytearray(2 * self._width)

    def add(self, value: int) -> None:
        node = self._width + value
        while node and not self._tree[node]:
            self._tree[node] = 1
            node //= 2

    def remove(self, value: int) -> None:
        node = self._width + value
        self._tree[node] = 0
        while node > 1 and not self._tree[node ^ 1]:  # the sibling is empty too, so the parent is
            node //= 2
            self._tree[node] = 0

    def at_least(self, value: int) -> int | None:
        node = self._width + value
        if not self._tree[node]:
            while node > 1 and (node & 1 or not self._tree[node + 1]):  # until something stands right of this subtree
                node //= 2
            if node <= 1:
                return None
            node += 1
        while node < self._width:
            node = 2 * node if self._tree[2 * node] else 2 * node + 1
        return node - self._width
