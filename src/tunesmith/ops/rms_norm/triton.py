"""RMSNorm and its backward as Triton kernels: a program holds one row in registers.

Same functions and arguments as ``cpu.py``, which derives the backward. Everything is computed in float32 and rounded
once. Rows may lie apart, but not the values of a row; offsets are 64-bit, since T * D passes 2**31 at long contexts.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (A kernel's language is no typed Python, and triton is installed where there is a GPU only.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["backward", "forward", "warps_for", "weight_gradient"]

# Rows and columns of a tile of the weight's gradient, and programs along the rows at most. Untuned.
_TILE = (16, 256)
_MOST_PARTS = 256


def warps_for(block: int) -> int:
    """Return the warps of a program that holds ``block`` values: 16 a thread, 4 to 16 warps.

    Untuned.
    """
    return min(16, max(4, triton.next_power_of_2(block) // 512))


@triton.jit
def _forward_kernel(
    x,
    residual,
    weight,
    out,
    total,
    rstd,
    x_stride,
    residual_stride,
    out_stride,
    total_stride,
    width,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row t of x, residual, out and total (T, D), and rstd (T,); weight (D,); D = ``width`` <= BLOCK; grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        # As it will be read again in the backward: rounded.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * total_stride + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(rstd + row, inverse)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(out + row * out_stride + column, (value * inverse * scale).to(out.dtype.element_ty), mask=inside)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    offset: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return h (T, D), total = x (+ residual, rounded to the dtype of x) and rstd (T,) in float32."""
    rows, width = x.shape
    out = x.new_empty(rows, width) if out is None else out
    total = x if residual is None else x.new_empty(rows, width)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    added = x if residual is None else residual
    block = triton.next_power_of_2(width)
    # A kernel runs on the current device, wherever its tensors are.
    with torch.cuda.device_of(x):
        _forward_kernel[(rows,)](
            x, added, weight, out, total, rstd,
            x.stride(0), added.stride(0), out.stride(0), total.stride(0), width, float(eps), float(offset),
            HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
    return out, total, rstd


@triton.jit
def _backward_kernel(
    dh,
    x,
    weight,
    rstd,
    dresidual,
    out,
    dh_stride,
    x_stride,
    dresidual_stride,
    out_stride,
    width,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row t of dh, x, dresidual and out (T, D), and rstd (T,); weight (D,); D = ``width`` <= BLOCK; grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dh + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    grad *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    inverse = tl.load(rstd + row)
    mean = tl.sum(grad * value, 0) / width
    result = inverse * (grad - value * (inverse * inverse * mean))
    if HAS_RESIDUAL:
        result += tl.load(dresidual + row * dresidual_stride + column, mask=inside, other=0.0).to(tl.float32)
    # The sum needed the whole row, so all of it has been read: ``out`` may lie on dh.
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=inside)


def backward(
    dh: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    *,
    offset: float,
    dresidual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return dx (T, D), with ``dresidual`` added where it is given; ``out`` may be ``dh`` or ``dresidual``."""
    rows, width = x.shape
    out = x.new_empty(rows, width) if out is None else out
    added = dh if dresidual is None else dresidual
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _backward_kernel[(rows,)](
            dh, x, weight, rstd, added, out,
            dh.stride(0), x.stride(0), added.stride(0), out.stride(0), width, float(offset),
            HAS_RESIDUAL=dresidual is not None, BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
    return out


@triton.jit
def _weight_kernel(
    dh,
    x,
    rstd,
    parts,
    dh_stride,
    x_stride,
    rows,
    width,
    steps,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row p of parts (P, D): the sum over ``steps`` * BLOCK_T rows of dh and x (T, D); grid (P, D / BLOCK_D)."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(steps):
        row = (part * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        grad = tl.load(dh + row[:, None] * dh_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        total += tl.sum(grad * (value * inverse[:, None]), 0)
    tl.store(parts + part * width + column, total, mask=column < width)


def weight_gradient(dh: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the weight (D,) in float32; the order of the sum depends on the shape alone."""
    rows, width = x.shape
    tall, wide = _TILE
    steps = max(1, triton.cdiv(rows, tall * _MOST_PARTS))
    count = triton.cdiv(rows, tall * steps)
    parts = torch.empty(count, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _weight_kernel[(count, triton.cdiv(width, wide))](
            dh, x, rstd, parts, dh.stride(0), x.stride(0), rows, width, steps, BLOCK_T=tall, BLOCK_D=wide, num_warps=4
        )
    return parts.sum(0)
