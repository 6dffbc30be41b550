"""Frozen weights of 4 or 8 bits (integers or float8), and the numbers they stand for.

``weights.py`` says how they are stored, ``reference.py`` what they mean; ``cpu.py`` and ``cuda.py`` write them into a
buffer before the matrix product that reads them.
"""

from __future__ import annotations

import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.dispatch import primitives
from tunesmith.ops.float8.reference import E4M3_MAX, LEAST_SCALE
from tunesmith.ops.quantized import reference
from tunesmith.ops.quantized.function import QuantizedLinear
from tunesmith.ops.quantized.weights import BLOCK, EightBitWeight, Float8Weight, FourBitWeight, QuantizedWeight

__all__ = [
    "EightBitWeight",
    "Float8Weight",
    "FourBitWeight",
    "QuantizedWeight",
    "dequantize",
    "quantize_float8",
    "quantized_linear",
    "reference",
]


def dequantize(
    weight: QuantizedWeight, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the matrix (F, D) that ``weight`` stands for.

    Equals :func:`reference.dequantize` bit for bit: computed in float32 and rounded once.

    Args:
        weight: a quantized matrix, see ``weights.py``.
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


def quantize_float8(weight: torch.Tensor, *, by_block: bool = False) -> Float8Weight:
    """Return ``weight`` (F, D) in float8 e4m3, the largest value of each scale at 448.

    Computed in float32. Rows and blocks of zeros have a scale of 1, and what would leave the range saturates.

    Args:
        weight: (F, D), floating, finite.
        by_block: a scale for each 128 rows and 128 columns in place of one a row.
    Raises:
        ShapeError: ``weight`` has not two axes.
    """
    if weight.ndim != 2:
        raise ShapeError(f"weight {tuple(weight.shape)} does not fit: (F, D) is needed")
    values = weight.detach().float()
    rows, columns = values.shape
    if by_block:
        values = torch.nn.functional.pad(values, (0, -columns % BLOCK, 0, -rows % BLOCK))
        values = values.view(len(values) // BLOCK, BLOCK, -1, BLOCK)
    scales = values.abs().amax(dim=(1, 3) if by_block else 1, keepdim=True) / E4M3_MAX
    # What is too small for a float32 scale is zero.
    scales = torch.where(scales > LEAST_SCALE, scales, 1.0)
    codes = (values / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    if by_block:
        codes = codes.view(-1, codes.shape[2] * BLOCK)[:rows, :columns].contiguous()
        scales = scales.view(scales.shape[0], scales.shape[2])
    return Float8Weight(codes, scales, by_block)


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
