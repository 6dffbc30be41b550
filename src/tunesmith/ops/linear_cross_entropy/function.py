"""The chunked loss: gradient in the forward pass, so that logits live for one chunk only.

With z = cap(c (h W^T + b)), p = softmax(z) and one-hot y, the loss of a row is logsumexp(z) - z_y and

    dz = (p - y) / divisor      dz' = dz (1 - (z / cap)^2) c      dh = dz' W      dW = dz'^T h      db = sum(dz')

The backward only multiplies by the incoming scalar. Losses are summed in float64; the softmax runs in float32.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["LinearCrossEntropy"]

# Logit bytes of one chunk: large enough for the matrix product's full rate, small beside the activations of a step.
_CHUNK_BYTES = 64 * 2**20


class LinearCrossEntropy(torch.autograd.Function):
    """``apply(hidden (N,D), weight (V,D), bias, targets (N,), divisor, logit_scale, softcap) -> scalar``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        divisor: float | torch.Tensor,
        logit_scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Save the finished gradients of hidden, weight and bias, as far as they are needed."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None and needs_bias else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        rows = max(16, _CHUNK_BYTES // (weight.shape[0] * wide.itemsize))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = torch.nn.functional.linear(hidden[part], weight, bias).to(wide)
            if logit_scale != 1.0:
                logits.mul_(logit_scale)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            log_sum = logits.logsumexp(-1)
            chosen = targets[part, None]
            total += (log_sum - logits.gather(1, chosen)[:, 0]).sum(dtype=torch.float64)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            slope = None if softcap is None else (logits / softcap).square_().neg_().add_(1)
            grad = logits.sub_(log_sum[:, None]).exp_()
            grad.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=wide))
            grad.mul_(logit_scale).div_(divisor)
            if slope is not None:
                grad.mul_(slope)
            low = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(low, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += low.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return (total / divisor).to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale the saved gradients by the incoming scalar."""
        incoming = grads[0]
        hidden, weight, bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if hidden is None else hidden * incoming,
            None if weight is None else (weight * incoming).to(weight_dtype),
            None if bias is None else (bias * incoming).to(bias_dtype),
            None,
            None,
            None,
            None,
        )
