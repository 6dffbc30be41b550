"""Quantized weights that stay written out from one product to the next, for as many layers as memory allows.

A product with a weight of 4 or 8 bits first writes out the numbers that it stands for, forward and backward, for every
part of every micro-batch. Base weights are frozen, so these numbers never change during a run: the plan of the run
says for how many layers they are kept (``memory/plan.py``). Where products run in float8, nothing is written out.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tunesmith.engine.layer import Group
from tunesmith.ops.lora_linear.cpu import dense_shape, write_out

__all__ = ["DenseWeights"]


class DenseWeights:
    """The dense weights of the first ``count`` layers of an engine, written at their first use in a training step."""

    def __init__(self) -> None:
        self.count = 0
        self._layers: dict[tuple[int, torch.dtype, torch.device], tuple[torch.Tensor | None, ...]] = {}
        # Lanes come to a layer at the same time.
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return DenseWeights, ()  # a copy of the model writes its own

    def filled(self, index: int, groups: Sequence[Group], like: torch.Tensor) -> tuple[Group, ...]:
        """Return the groups of layer ``index`` with what stays written out, in dtype and device of ``like``."""
        if index >= self.count:
            return tuple(groups)
        key = (index, like.dtype, like.device)
        with self._lock:
            found = self._layers.get(key)
            if found is None and torch.is_grad_enabled():  # an evaluation alone has no second use for them
                found = self._layers[key] = tuple(_dense(group, like) for group in groups)
        if found is None:
            return tuple(groups)
        pairs = zip(groups, found, strict=True)
        return tuple(group if dense is None else replace(group, stacked=dense) for group, dense in pairs)

    def nbytes(self) -> int:
        """Return the bytes of what is written out."""
        return sum(dense.nbytes for groups in self._layers.values() for dense in groups if dense is not None)

    def clear(self) -> None:
        """Give the memory back, until the next step."""
        self._layers.clear()


def _dense(group: Group, like: torch.Tensor) -> torch.Tensor | None:
    if group.float8 is not None or not any(p.quantized for p in group.projections):
        return None
    out = like.new_empty(dense_shape(group.projections))
    write_out(group.projections, out)
    return out
