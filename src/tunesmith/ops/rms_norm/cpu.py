"""RMSNorm and its backward in plain torch, blocked over rows.

With r = rsqrt(mean(x^2) + eps), w' = weight + offset and g = dh w', the output is h = x r w' and

    dx = r g - x r^3 mean(g x)        dw = sum over rows of dh x r
"""

from __future__ import annotations

import torch

from tunesmith.ops.rows import block_rows, row_blocks, wide_dtype
from tunesmith.ops.scripted import scripted

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
    _forward(total, scale, eps, out, rstd, block_rows(width, wide.itemsize))
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
    wide, width = rstd.dtype, x.shape[1]
    scale = weight.to(wide) + offset if offset else weight.to(wide)
    _backward(dh, x, scale, rstd, dresidual, out, block_rows(width, wide.itemsize))
    return out


def weight_gradient(dh: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the weight (D,) in at least float32."""
    total = torch.zeros(x.shape[1], dtype=rstd.dtype, device=x.device)
    for part in row_blocks(x.shape[0], x.shape[1], rstd.dtype.itemsize):
        total += (dh[part].to(rstd.dtype) * x[part]).mul_(rstd[part, None]).sum(0)
    return total


@scripted
def _forward(
    total: torch.Tensor, scale: torch.Tensor, eps: float, out: torch.Tensor, rstd: torch.Tensor, step: int
) -> None:
    """Write ``rstd`` and ``out``, ``step`` rows at a time."""
    rows, width = total.size(0), total.size(1)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        block, inverse, target = total[start:end].to(rstd.dtype), rstd[start:end], out[start:end]
        inverse.copy_(torch.linalg.vector_norm(block, dim=-1).square_().div_(width).add_(eps).rsqrt_())
        if target.dtype == block.dtype:
            torch.mul(block, inverse.unsqueeze(1), out=target)
            target.mul_(scale)
        else:
            target.copy_(block.mul_(inverse.unsqueeze(1)).mul_(scale))


@scripted
def _backward(
    dh: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    rstd: torch.Tensor,
    dresidual: torch.Tensor | None,
    out: torch.Tensor,
    step: int,
) -> None:
    """Write ``out``, ``step`` rows at a time."""
    rows, width = x.size(0), x.size(1)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        block, inverse = x[start:end].to(rstd.dtype), rstd[start:end]
        grad = dh[start:end].to(rstd.dtype) * scale
        mean = torch.linalg.vecdot(grad, block).mul_(inverse).mul_(inverse).mul_(inverse).div_(width)
        grad.mul_(inverse.unsqueeze(1)).addcmul_(block, mean.unsqueeze(1), value=-1)
        if dresidual is not None:
            grad.add_(dresidual[start:end])
        out[start:end].copy_(grad)
