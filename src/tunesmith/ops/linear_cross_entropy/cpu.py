"""Losses of rows of logits and their gradients, in place, in plain torch, blocked over rows.

With z = cap(c l), p = softmax(z), one-hot y, smoothing e over V classes and q = (1 - e) y + e / V, the loss of a row is

    loss = logsumexp(z) - sum(q z)      dz = (p - q) / divisor      dl = dz (1 - (z / cap)^2) c
"""

from __future__ import annotations

import torch

from tunesmith.ops.rows import row_blocks, wide_dtype

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
) -> torch.Tensor:
    """Return the losses (N,), not divided and in at least float32, of ``logits`` (N, V), which may be overwritten.

    With ``want_grad`` the gradient of the raw logits, divided by ``divisor``, is left in ``logits``, rounded to their
    dtype. With ``has_idle`` targets below 0 are of rows without a loss and a gradient.
    """
    (rows, classes), wide = logits.shape, wide_dtype(logits.dtype)
    losses = torch.empty(rows, dtype=wide, device=logits.device)
    # A divisor on the device stays there, in the precision of the gradient.
    factor = logit_scale / (divisor.to(wide) if isinstance(divisor, torch.Tensor) else divisor)
    for part in row_blocks(rows, classes, wide.itemsize):
        z, target = logits[part].to(wide), targets[part, None]
        chosen = target.clamp(min=0) if has_idle else target
        if logit_scale != 1.0:
            z.mul_(logit_scale)
        slope = None
        if softcap is not None:
            z.div_(softcap).tanh_()
            slope = 1 - z * z if want_grad else None
            z.mul_(softcap)
        highest = z.amax(-1, keepdim=True)
        expected = (1 - label_smoothing) * (z.gather(1, chosen) - highest)
        if label_smoothing:
            expected += label_smoothing * (z.mean(-1, keepdim=True) - highest)
        z.sub_(highest).exp_()
        total = z.sum(-1, keepdim=True)
        loss = total.log() - expected
        losses[part] = (loss.masked_fill_(target < 0, 0.0) if has_idle else loss)[:, 0]
        if not want_grad:
            continue
        z.mul_(factor / total)
        z.scatter_add_(1, chosen, torch.full_like(total, label_smoothing - 1) * factor)
        if label_smoothing:
            z.sub_(label_smoothing / classes * factor)
        if slope is not None:
            z.mul_(slope)
        if has_idle:
            z.masked_fill_(target < 0, 0.0)
        if wide != logits.dtype:
            logits[part] = z
    return losses
