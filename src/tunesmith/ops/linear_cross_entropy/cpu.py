"""Losses of rows of logits and their gradients, in place, in plain torch.

With z = cap(c l), p = softmax(z), one-hot y, smoothing e over V classes and q = (1 - e) y + e / V, the loss of a row is

    loss = logsumexp(z) - sum(q z)      dz = (p - q) / divisor      dl = dz (1 - (z / cap)^2) c
"""

from __future__ import annotations

import torch

__all__ = ["row_losses_"]


def row_losses_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    divisor: float | torch.Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    want_grad: bool,
    has_idle: bool = False,
    grad_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the losses (N,), not divided, of ``logits`` (N, V) in at least float32, which are overwritten.

    With ``want_grad`` the gradient of the raw logits, divided by ``divisor``, is left in ``logits``, or written to
    ``grad_out`` and rounded there. With ``has_idle`` targets below 0 are of rows without a loss and a gradient.
    """
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    log_sum = logits.logsumexp(-1)
    chosen = (targets.clamp(min=0) if has_idle else targets)[:, None]
    losses = log_sum - (1 - label_smoothing) * logits.gather(1, chosen)[:, 0]
    if label_smoothing:
        losses -= label_smoothing * logits.mean(-1)
    if has_idle:
        losses.masked_fill_(targets < 0, 0.0)
    if not want_grad:
        return losses
    slope = None if softcap is None else (logits / softcap).square_().neg_().add_(1)
    grad = logits.sub_(log_sum[:, None]).exp_()
    grad.scatter_add_(1, chosen, torch.full_like(chosen, -(1 - label_smoothing), dtype=grad.dtype))
    if label_smoothing:
        grad.sub_(label_smoothing / grad.shape[1])
    # A divisor on the device stays there, in the precision of the gradient.
    grad.mul_(logit_scale / (divisor.to(grad.dtype) if isinstance(divisor, torch.Tensor) else divisor))
    if slope is not None:
        grad.mul_(slope)
    if has_idle:
        grad.masked_fill_(targets[:, None] < 0, 0.0)
    if grad_out is not None:
        grad_out.copy_(grad)
    return losses
