"""RMSNorm and its backward in plain torch, blocked over rows.

With r = rsqrt(mean(x^2) + eps), w' = weight + offset and g = dh w', the output is h = x r w' and

    dx = r g - x r^3 mean(g x)        dw = sum over rows of dh x r
"""

from __future__ import annotations

import torch

from tunesmith.ops.rows import row_blocks, wide_dtype

__all__ = ["backward", "forward", "weight_gradient"]


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    offset: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return h (T, D), total = x (+ residual, rounded to the dtype of x) and rstd (T,) in at least float32."""
    total = x if residual is None else x + residual
    out = torch.empty_like(total, memory_format=torch.contiguous_format) if out is None else out
    wide, (rows, width) = wide_dtype(x.dtype), total.shape
    scale = weight.to(wide) + offset if offset else weight.to(wide)
    rstd = torch.empty(rows, dtype=wide, device=x.device)
    for part in row_blocks(rows, width, wide.itemsize):
        block = total[part].to(wide)
        torch.rsqrt(torch.linalg.vector_norm(block, dim=-1).square_().div_(width).add_(eps), out=rstd[part])
        if wide == out.dtype:
            torch.mul(block, rstd[part, None], out=out[part]).mul_(scale)
        else:
            out[part].copy_(block.mul_(rstd[part, None]).mul_(scale))
    return out, total, rstd


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
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    wide, (rows, width) = rstd.dtype, x.shape
    scale = weight.to(wide) + offset if offset else weight.to(wide)
    for part in row_blocks(rows, width, wide.itemsize):
        block, inverse = x[part].to(wide), rstd[part]
        grad = dh[part].to(wide) * scale
        mean = torch.linalg.vecdot(grad, block).mul_(inverse).mul_(inverse).mul_(inverse).div_(width)
        grad.mul_(inverse[:, None]).addcmul_(block, mean[:, None], value=-1)
        out[part].copy_(grad if dresidual is None else grad.add_(dresidual[part]))
    return out


def weight_gradient(dh: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the weight (D,) in at least float32."""
    total = torch.zeros(x.shape[1], dtype=rstd.dtype, device=x.device)
    for part in row_blocks(x.shape[0], x.shape[1], rstd.dtype.itemsize):
        total += (dh[part].to(rstd.dtype) * x[part]).mul_(rstd[part, None]).sum(0)
    return total
