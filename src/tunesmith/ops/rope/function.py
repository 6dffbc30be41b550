"""Rotary embedding as autograd functions over the dispatched primitives."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.ops.dispatch import primitives
from tunesmith.ops.once import differentiable_once
from tunesmith.ops.rows import side_by_side

__all__ = ["NormRotate", "Rotate"]


class Rotate(torch.autograd.Function):
    """``apply(heads (T, H, E), cos (T, Er), sin) -> (T, H, E)``; saves the tables only."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate a copy."""
        ctx.save_for_backward(cos, sin)
        turned = heads.clone(memory_format=torch.contiguous_format)
        primitives("rope", heads).rotate_(turned, cos, sin)
        return turned

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Rotate the gradient back."""
        cos, sin = ctx.saved_tensors
        turned = grads[0].clone(memory_format=torch.contiguous_format)
        primitives("rope", turned).rotate_(turned, cos, sin, inverse=True)
        return turned, None, None


class NormRotate(torch.autograd.Function):
    """``apply(heads (T, H, E), weight (E,), cos, sin, eps, offset) -> (T, H, E)``."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: torch.Tensor,
        weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
        offset: float,
    ) -> torch.Tensor:
        """Save the heads before the norm, and rstd."""
        out = torch.empty_like(heads, memory_format=torch.contiguous_format)
        rstd = primitives("rope", heads).norm_rotate(heads, weight, cos, sin, eps=eps, offset=offset, out=out)
        ctx.save_for_backward(heads, weight, rstd, cos, sin)
        ctx.offset = offset
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of heads and weight."""
        heads, weight, rstd, cos, sin = ctx.saved_tensors
        dweight = torch.zeros(weight.shape, dtype=rstd.dtype, device=weight.device)
        dy = side_by_side(grads[0])
        dx = primitives("rope", heads).norm_rotate_backward(
            dy,
            heads,
            weight,
            rstd,
            cos,
            sin,
            offset=ctx.offset,
            out=torch.empty_like(dy),
            dweight=dweight if ctx.needs_input_grad[1] else None,
        )
        return dx, dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None, None, None
