"""The gated activation as one autograd function over the dispatched primitives; saves its input only."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.ops.dispatch import primitives
from tunesmith.ops.once import differentiable_once
from tunesmith.ops.rows import side_by_side

__all__ = ["SwiGLU"]


class SwiGLU(torch.autograd.Function):
    """``apply(gate_up (T, 2F), activation) -> (T, F)``."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """Save gate and up."""
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return primitives("swiglu", gate_up).forward(gate_up, activation=activation)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient of gate and up, in a new tensor."""
        (gate_up,) = ctx.saved_tensors
        return primitives("swiglu", gate_up).backward(side_by_side(grads[0]), gate_up, activation=ctx.activation), None
