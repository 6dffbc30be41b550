"""Quantized weights on a GPU: 4 bits through bitsandbytes' kernel, whose layout they have; float8 in one piece."""

from __future__ import annotations

import torch

from tunesmith.ops.quantized import cpu, reference
from tunesmith.ops.quantized.weights import EightBitWeight, Float8Weight, QuantizedWeight

__all__ = ["dequantize"]


def dequantize(weight: QuantizedWeight, out: torch.Tensor) -> None:
    """Write the matrix to ``out`` (F, D), contiguous, float32, float16 or bfloat16."""
    if isinstance(weight, Float8Weight):
        cpu.dequantize_float8(weight, slice(0, len(out)), out)
        return
    if isinstance(weight, EightBitWeight):
        cpu.dequantize(weight, out)
        return
    # The op exists as soon as bitsandbytes is imported, as it is where such a weight comes from.
    torch.ops.bitsandbytes.dequantize_4bit.out(
        weight.codes, reference.block_scales(weight), weight.block, weight.kind, weight.shape, out.dtype, out=out
    )
