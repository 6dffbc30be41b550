"""What a quantized matrix means, in plain torch: the definition that the fast path is compared with."""

from __future__ import annotations

import torch

from tunesmith.ops.quantized.weights import BLOCK, EightBitWeight, Float8Weight, FourBitWeight, QuantizedWeight

__all__ = ["block_scales", "dequantize"]


def dequantize(weight: QuantizedWeight) -> torch.Tensor:
    """Return (F, D) float32."""
    if isinstance(weight, EightBitWeight):
        return weight.codes.float() * (weight.scales / 127)[:, None]
    if isinstance(weight, Float8Weight):
        return weight.codes.float() * _every_scale(weight)
    rows, columns = weight.shape
    codes = weight.codes.reshape(-1)
    entries = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[: rows * columns]
    scales = block_scales(weight).repeat_interleave(weight.block)[: rows * columns]
    return (weight.table[entries.long()] * scales).view(rows, columns)


def _every_scale(weight: Float8Weight) -> torch.Tensor:
    """Return (F, D) or (F, 1) float32."""
    if not weight.is_blocked:
        return weight.scales
    rows, columns = weight.shape
    return weight.scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def block_scales(weight: FourBitWeight) -> torch.Tensor:
    """Return the scale of every block, float32."""
    nested = weight.nested
    if nested is None:
        return weight.scales.float()
    per_block = nested.scales.repeat_interleave(nested.block)[: weight.scales.numel()]
    return nested.table[weight.scales.reshape(-1).long()] * per_block + nested.offset
