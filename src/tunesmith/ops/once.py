"""Backwards that are written by hand have no derivative of their own, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["differentiable_once"]


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``backward``, which refuses to be differentiated.

    torch's own ``once_differentiable`` leaves an error behind that only a walk through the whole graph meets: where
    ``torch.autograd.grad`` asks for second derivatives of some tensors, these come out as zero.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this layer has no second derivatives (create_graph=True). For them take the layers of transformers: "
                "load the model with attn_implementation='eager' and call peft.get_peft_model on it."
            )
        return backward(ctx, *grads)

    return once
