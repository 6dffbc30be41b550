"""Rows rounded to float8 as a Triton kernel: a program reads a row once, finds its scale and writes its codes.

Same function and arguments as ``cpu.py``.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (A kernel's language is no typed Python, and triton is installed where there is a GPU only.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tunesmith.ops.float8 import cpu

__all__ = ["quantize_rows"]

# Columns of a row that a program holds in registers. Untuned.
_MOST_COLUMNS = 65536


@triton.jit
def _rows_kernel(
    x, factor, codes, scales, x_stride, codes_stride, width, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Row t of x and codes (T, D), and scales (T,); factor (D,); D = ``width`` <= BLOCK; grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        value = value * tl.load(factor + column, mask=inside, other=0.0)
    scale = tl.max(tl.abs(value), 0) / 448.0
    # The maximum passes NaN over. The difference is NaN where a value is not finite, and with it the scale.
    scale = tl.where(scale > 1e-30, scale, 1.0) + tl.sum(value - value, 0)
    value = tl.minimum(tl.maximum(value / scale, -448.0), 448.0)
    tl.store(codes + row * codes_stride + column, value.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(x: torch.Tensor, factor: torch.Tensor | None, codes: torch.Tensor) -> torch.Tensor:
    """Write the codes of ``x * factor`` (T, D) to ``codes`` and return the scales (T, 1) float32."""
    rows, width = x.shape
    if width > _MOST_COLUMNS:
        return cpu.quantize_rows(x, factor, codes)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _rows_kernel[(rows,)](
            x, x if factor is None else factor, codes, scales, x.stride(0), codes.stride(0), width,
            HAS_FACTOR=factor is not None, BLOCK=block, num_warps=min(32, max(4, block // 1024)),
        )  # fmt: skip
    return scales
