"""RMSNorm as one autograd function over the dispatched primitives; saves its input and one number a row."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.ops.dispatch import primitives
from tunesmith.ops.once import differentiable_once
from tunesmith.ops.rows import side_by_side

__all__ = ["RMSNorm"]


class RMSNorm(torch.autograd.Function):
    """``apply(x (T, D), weight (D,), eps, offset) -> (T, D)``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """Save x, weight and rstd."""
        x = side_by_side(x)
        h, _, rstd = primitives("rms_norm", x).forward(x, weight, eps=eps, offset=offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return h

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of x and weight, as far as they are needed."""
        x, weight, rstd = ctx.saved_tensors
        kernels, dh = primitives("rms_norm", x), side_by_side(grads[0])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = kernels.backward(dh, x, weight, rstd, offset=ctx.offset)
        if ctx.needs_input_grad[1]:
            dw = kernels.weight_gradient(dh, x, rstd).to(weight.dtype)
        return dx, dw, None, None
