"""Quantized weights on a GPU: 4 bits through the kernel of bitsandbytes, whose layout they have."""

from __future__ import annotations

import torch

from tunesmith.ops.quantized import cpu, reference
from tunesmith.ops.quantized.weights import EightBitWeight, QuantizedWeight

__all__ = ["dequantize"]


def dequantize(weight: QuantizedWeight, out: torch.Tensor) -> None:
    """Write the matrix to ``out`` (F, D), contiguous, float32, float16 or bfloat16."""
    if isinstance(weight, EightBitWeight):
        cpu.dequantize(weight, out)
        return
    # The op exists as soon as bitsandbytes is imported, as it is where such a weight comes from.
    torch.ops.bitsandbytes.dequantize_4bit.out(
        weight.codes, reference.block_scales(weight), weight.block, weight.kind, weight.shape, out.dtype, out=out
    )
