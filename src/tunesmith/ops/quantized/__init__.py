"""Frozen weights of 4 or 8 bits, and the numbers they stand for.

``weights.py`` says how they are stored, ``reference.py`` what they mean; ``cpu.py`` and ``cuda.py`` write them into a
buffer before the matrix product that reads them.
"""

from __future__ import annotations

import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.dispatch import primitives
from tunesmith.ops.quantized import reference
from tunesmith.ops.quantized.function import QuantizedLinear
from tunesmith.ops.quantized.weights import EightBitWeight, FourBitWeight, QuantizedWeight

__all__ = ["EightBitWeight", "FourBitWeight", "QuantizedWeight", "dequantize", "quantized_linear", "reference"]


def dequantize(
    weight: QuantizedWeight, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the matrix (F, D) that ``weight`` stands for.

    Equals :func:`reference.dequantize` bit for bit: computed in float32 and rounded once.

    Args:
        weight: what bitsandbytes made of a matrix, see ``weights.py``.
        dtype: of the result; float32 unless ``out`` is given.
        out: (F, D), contiguous, written to and returned.
    Raises:
        ShapeError: ``out`` has another shape, or is not contiguous.
    Source: Dettmers et al. 2023, arXiv:2305.14314 (NF4, double quantization); 2022, arXiv:2208.07339 (8 bits).
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or torch.float32, device=weight.codes.device)
    if tuple(out.shape) != weight.shape or not out.is_contiguous():
        raise ShapeError(f"out {tuple(out.shape)} does not fit: {weight.shape}, contiguous, is needed")
    primitives("quantized", out).dequantize(weight, out)
    return out


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ dequantize(weight).T + bias`` in the dtype of ``x``; the dense weight is made again in the backward.

    Args:
        x: (..., D), floating.
        weight: (F, D), frozen.
        bias: (F,) or None.
    Raises:
        ShapeError: the last axis of ``x`` is not D.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"x {tuple(x.shape)} and weight {weight.shape} do not fit: (..., D) and (F, D) are needed")
    return QuantizedLinear.apply(x, weight, bias)  # type: ignore[no-any-return]
