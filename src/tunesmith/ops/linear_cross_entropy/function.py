"""The chunked loss and the chunked log-probabilities: logits live for one chunk only.

For a sum of losses the gradient is made in the forward pass and the backward multiplies by the incoming scalar. For
log-probabilities each row waits for a factor of its own: the gradient of ``hidden`` is kept for a factor of one and
scaled by rows in the backward; that of a trained ``weight``, which mixes rows, is computed again there. Losses are
summed in float64; the softmax runs in float32 (``cpu.py`` has the formulas, ``triton.py`` the kernel of a GPU).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.ops.dispatch import primitives
from tunesmith.ops.once import differentiable_once
from tunesmith.ops.rows import wide_dtype

__all__ = ["Head", "LinearCrossEntropy", "LinearLogProbs"]

# Logit bytes of one chunk: large enough for the matrix product's full rate, small beside the activations of a step. On
# a CPU below the 32 MiB from which on glibc takes every block from the system and gives it back: its pages would be
# cleared anew for every chunk.
_CHUNK_BYTES, _CHUNK_BYTES_GPU = 24 * 2**20, 512 * 2**20


@dataclass(frozen=True, slots=True)
class Head:
    """What lies between the product with the weight and the softmax, and what is special about the labels."""

    logit_scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    has_idle: bool = False


@dataclass(slots=True)
class _Chunk:
    """Losses of some rows, and the gradient of their raw logits in the dtype of hidden (None unless wanted)."""

    rows: slice
    losses: torch.Tensor
    grad: torch.Tensor | None


def _chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    divisor: float | torch.Tensor,
    head: Head,
    *,
    want_grad: bool,
) -> Iterator[_Chunk]:
    kernels = primitives("linear_cross_entropy", hidden)
    chunk = _CHUNK_BYTES_GPU if hidden.device.type == "cuda" else _CHUNK_BYTES
    step = max(16, chunk // (weight.shape[0] * hidden.itemsize))
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        logits = torch.nn.functional.linear(hidden[part], weight, bias)
        losses = kernels.row_losses_(
            logits,
            targets[part],
            divisor,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            label_smoothing=head.label_smoothing,
            has_idle=head.has_idle,
            want_grad=want_grad,
        )
        made = _Chunk(part, losses, logits if want_grad else None)
        yield made
        made.grad = None  # who asked still has it: the logits of two chunks would stand side by side
        del logits


def _add_product(total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add ``grad`` (N, V) transposed times ``hidden`` (N, D) to ``total`` (V, D), where dtypes allow without a copy."""
    if total.dtype == hidden.dtype:
        total.addmm_(grad.t(), hidden)
    else:
        total += grad.t() @ hidden


def _scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``x`` times a scalar in ``dtype``, with no copy in that of ``x``."""
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=dtype, device=x.device))


class LinearCrossEntropy(torch.autograd.Function):
    """``apply(hidden (N,D), weight (V,D), bias, targets (N,), divisor, head) -> scalar``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        divisor: float | torch.Tensor,
        head: Head,
    ) -> torch.Tensor:
        """Save the finished gradients of hidden, weight and bias, as far as they are needed."""
        wide = wide_dtype(hidden.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None and needs_bias else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        wanted = needs_hidden or needs_weight or needs_bias
        for chunk in _chunks(hidden, weight, bias, targets, divisor, head, want_grad=wanted):
            total += chunk.losses.sum(dtype=torch.float64)
            if chunk.grad is None:
                continue
            if grad_hidden is not None:
                torch.mm(chunk.grad, weight, out=grad_hidden[chunk.rows])
            if grad_weight is not None:
                _add_product(grad_weight, chunk.grad, hidden[chunk.rows])
            if grad_bias is not None:
                grad_bias += chunk.grad.sum(0, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return (total / divisor).to(wide)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale the saved gradients by the incoming scalar."""
        incoming = grads[0]
        hidden, weight, bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if hidden is None else hidden * incoming,
            None if weight is None else _scaled(weight, incoming, weight_dtype),
            None if bias is None else _scaled(bias, incoming, bias_dtype),
            None,
            None,
            None,
        )


class LinearLogProbs(torch.autograd.Function):
    """``apply(hidden (N,D), weight (V,D), bias, targets (N,), head) -> (N,)``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: Head,
    ) -> torch.Tensor:
        """Save the gradient of hidden for a factor of one, and the inputs where the weight is trained."""
        result = torch.empty(len(hidden), dtype=wide_dtype(hidden.dtype), device=hidden.device)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        unit = torch.empty_like(hidden) if needs_hidden else None
        for chunk in _chunks(hidden, weight, bias, targets, -1.0, head, want_grad=needs_hidden):
            result[chunk.rows] = chunk.losses.neg_()
            if unit is not None:
                assert chunk.grad is not None
                torch.mm(chunk.grad, weight, out=unit[chunk.rows])
        again = needs_weight or needs_bias
        ctx.save_for_backward(unit, *((hidden, weight, bias, targets) if again else ()))
        ctx.head = head
        return result

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale by rows; go over the logits once more for weight and bias."""
        incoming = grads[0]
        unit, *inputs = ctx.saved_tensors
        grad_hidden = None if unit is None else (unit * incoming[:, None]).to(unit.dtype)
        grad_weight = grad_bias = None
        if inputs:
            hidden, weight, bias, targets = inputs
            wide = wide_dtype(hidden.dtype)
            sums = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
            bias_sum = torch.zeros(len(weight), dtype=wide, device=weight.device) if ctx.needs_input_grad[2] else None
            for chunk in _chunks(hidden, weight, bias, targets, -1.0, ctx.head, want_grad=True):
                assert chunk.grad is not None
                chunk.grad.mul_(incoming[chunk.rows, None].to(chunk.grad.dtype))
                if sums is not None:
                    _add_product(sums, chunk.grad, hidden[chunk.rows])
                if bias_sum is not None:
                    bias_sum += chunk.grad.sum(0, dtype=wide)
            grad_weight = None if sums is None else sums.to(weight.dtype)
            grad_bias = None if bias_sum is None or bias is None else bias_sum.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None
