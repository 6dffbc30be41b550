"""The linear layer with its adapter as one autograd function over the primitives of ``cpu.py``, for a single layer.

W gets no gradient: that product, a third of a full layer's work, is not computed. Saved are x and x A^T.
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.ops.lora_linear import cpu
from tunesmith.ops.lora_linear.cpu import Projection
from tunesmith.ops.once import differentiable_once

__all__ = ["LoraLinear"]


class LoraLinear(torch.autograd.Function):
    """``apply(x (..., D), weight (F, D), a (R, D), b (F, R), bias, scale) -> (..., F)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Save x, s and the parameters."""
        rows = x.reshape(-1, x.shape[-1])
        y, s = cpu.forward(rows, None, [Projection(weight, bias, a, b, scale)])
        ctx.save_for_backward(rows, weight, a, b, s)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of x, a and b, as far as they are needed."""
        rows, weight, a, b, s = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])
        needs_x, _, needs_a, needs_b = ctx.needs_input_grad[:4]
        layer = [
            Projection(
                weight.detach(), None, a.detach().requires_grad_(needs_a), b.detach().requires_grad_(needs_b), ctx.scale
            )
        ]
        ds = cpu.low_rank_gradient(dy, layer)
        (found,) = cpu.parameter_gradients(dy, ds, rows, s, layer)
        dx = cpu.input_gradient(dy, ds, None, layer, out=torch.empty_like(rows)).view(ctx.shape) if needs_x else None
        return dx, None, found.get("a"), found.get("b"), None, None
