"""The adapter's forward and backward written out.

With s = x A^T and B' = scale B, the output is y = x W^T + s B'^T, and for the incoming gradient dy

    ds = dy B'        dx = dy W + ds A        dA = ds^T x        dB = scale dy^T s

Both sums are one in-place ``addmm``: the base's product is the accumulator of the adapter's, so that the output is
written twice and never copied. W gets no gradient: that product, a third of a full layer's work, is not computed.
"""

from __future__ import annotations

from typing import Any

import torch

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
        a_low, b_low = a.to(x.dtype), (b * scale).to(x.dtype)
        s = rows @ a_low.t()
        y = torch.nn.functional.linear(rows, weight, bias)
        y.addmm_(s, b_low.t())
        ctx.save_for_backward(rows, weight, a, b, s)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of x, a and b, as far as they are needed."""
        rows, weight, a, b, s = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])
        needs_x, _, needs_a, needs_b = ctx.needs_input_grad[:4]
        dx = da = db = None
        if needs_x or needs_a:
            ds = dy @ (b * ctx.scale).to(dy.dtype)
            if needs_x:
                dx = dy @ weight
                dx.addmm_(ds, a.to(dy.dtype))
                dx = dx.view(ctx.shape)
            if needs_a:
                da = (ds.t() @ rows).to(a.dtype)
        if needs_b:
            db = (dy.t() @ s).to(b.dtype) * ctx.scale
        return dx, None, da, db, None, None
