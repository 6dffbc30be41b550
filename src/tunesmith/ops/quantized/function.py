"""A frozen linear layer in few bits: the dense weight exists while a product reads it, forward and again backward."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.ops.dispatch import primitives
from tunesmith.ops.once import differentiable_once
from tunesmith.ops.quantized.weights import QuantizedWeight

__all__ = ["QuantizedLinear"]


class QuantizedLinear(torch.autograd.Function):
    """``apply(x (..., D), weight, bias (F,) or None) -> (..., F)``; nothing dense is saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of ``x``."""
        ctx.weight = weight
        return torch.nn.functional.linear(x, _dense(weight, x), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of x and of the bias, as far as they are needed."""
        (dy,) = grads
        dx = dy @ _dense(ctx.weight, dy) if ctx.needs_input_grad[0] else None
        return dx, None, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


def _dense(weight: QuantizedWeight, like: torch.Tensor) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=like.dtype, device=like.device)
    primitives("quantized", out).dequantize(weight, out)
    return out
