"""Weights that read one input, stacked: each Parameter a view of one tensor, so that one matrix product serves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["is_distributed", "lie_elsewhere", "lies_in", "stack"]


@torch.no_grad()
def stack(present: torch.Tensor | None, weights: list[Any]) -> torch.Tensor | None:
    """Return one tensor of which all ``weights`` are views, ``present`` if it is that; None where they cannot be."""
    if any(type(w) is not nn.Parameter or w.is_meta or w.dtype != weights[0].dtype for w in weights):
        return None
    if not weights[0].is_floating_point() and weights[0].dtype != torch.uint8:  # the codes of float8
        return None
    if len(weights) == 1:
        return weights[0].data
    if present is not None and lies_in(present, weights):
        return present
    with torch.inference_mode(False):  # they may train later
        stacked = torch.cat([weight.data for weight in weights])
        for weight, part in zip(weights, stacked.split([w.shape[0] for w in weights]), strict=True):
            weight.data = part
    return stacked


def lies_in(present: torch.Tensor, weights: list[Any]) -> bool:
    """Return whether ``weights`` are, one after the other, the rows of ``present``."""
    place = present.data_ptr()
    for weight in weights:
        if weight is None or weight.is_meta or weight.dtype != present.dtype or not weight.is_contiguous():
            return False
        if weight.data_ptr() != place:
            return False
        place += weight.numel() * weight.itemsize
    return True


def lie_elsewhere(present: torch.Tensor | None, weights: list[Any]) -> bool:
    """Return whether one of ``weights`` is part of a larger tensor that is not ``present``."""
    own = None if present is None else present.untyped_storage().data_ptr()
    storages = [(weight, weight.untyped_storage()) for weight in weights if isinstance(weight, nn.Parameter)]
    return any(s.nbytes() > weight.nbytes and s.data_ptr() != own for weight, s in storages if not weight.is_meta)


def is_distributed() -> bool:
    """Return whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
