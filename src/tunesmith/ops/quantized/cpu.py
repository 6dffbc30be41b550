"""Quantized weights in plain torch, a piece at a time, so that what lies between stays in the cache.

A byte of a 4-bit weight holds two entries: looked up as one pair in a table of 256. Bit-equal to the reference.
"""

from __future__ import annotations

import torch

from tunesmith.ops.quantized import reference
from tunesmith.ops.quantized.weights import BLOCK, EightBitWeight, Float8Weight, FourBitWeight, QuantizedWeight
from tunesmith.ops.rows import row_blocks

__all__ = ["dequantize", "dequantize_float8"]

_PIECE = 2**17
"""Entries at a time: half a megabyte of float32, and half as much of indices."""


def dequantize(weight: QuantizedWeight, out: torch.Tensor) -> None:
    """Write the matrix to ``out`` (F, D), contiguous, of any floating dtype."""
    rows, columns = weight.shape
    if isinstance(weight, Float8Weight):
        for part in row_blocks(rows, columns, 4, multiple=BLOCK):
            dequantize_float8(weight, part, out[part])
    elif isinstance(weight, EightBitWeight):
        scales = (weight.scales / 127)[:, None]
        for part in row_blocks(rows, columns, 4):
            out[part] = weight.codes[part].float().mul_(scales[part])
    elif columns % 2 or rows * columns % weight.block or weight.block % 2:
        out.copy_(reference.dequantize(weight))
    else:
        _by_pairs(weight, out.view(-1))


def dequantize_float8(weight: Float8Weight, part: slice, out: torch.Tensor) -> None:
    """Write the rows ``part``, which begin with a block, to ``out``, contiguous, of any floating dtype.

    e4m3 is exact in 16 bits, and torch multiplies a 16-bit tensor by a float32 one in float32: rounded once.
    """
    if out.dtype == torch.float64:
        narrow = torch.empty_like(out, dtype=torch.float32)
        dequantize_float8(weight, part, narrow)
        out.copy_(narrow)
        return
    out.copy_(weight.codes[part])
    if not weight.is_blocked:
        out.mul_(weight.scales[part])
        return
    rows, columns = out.shape
    whole = rows // BLOCK
    scales = weight.scales[part.start // BLOCK :].repeat_interleave(BLOCK, 1)[:, :columns]
    out[: whole * BLOCK].view(whole, BLOCK, columns).mul_(scales[:whole, None])
    if rows % BLOCK:
        out[whole * BLOCK :].mul_(scales[whole])


def _by_pairs(weight: FourBitWeight, out: torch.Tensor) -> None:
    codes, scales = weight.codes.reshape(-1), reference.block_scales(weight)
    table = torch.stack([weight.table.repeat_interleave(16), weight.table.repeat(16)], dim=1)
    # Two float32 are moved as one integer.
    pairs = table.view(torch.int64).view(-1)
    piece = max(weight.block, _PIECE // weight.block * weight.block)
    is_direct = out.dtype == torch.float32 and out.storage_offset() % 2 == 0
    buffer = out if is_direct else torch.empty(min(piece, len(out)), dtype=torch.float32, device=out.device)
    for start in range(0, len(out), piece):
        end = min(start + piece, len(out))
        values = out[start:end] if is_direct else buffer[: end - start]
        torch.index_select(pairs, 0, codes[start // 2 : end // 2].int(), out=values.view(torch.int64))
        values.view(-1, weight.block).mul_(scales[start // weight.block : end // weight.block, None])
        if not is_direct:
            out[start:end] = values
