"""Cross-entropy and log-probabilities through full logits in plain torch: what fast paths are compared with."""

from __future__ import annotations

import torch

__all__ = ["linear_cross_entropy", "linear_log_probs"]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    divisor: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    has_idle: bool = False,
) -> torch.Tensor:
    """Return the scalar loss; the arguments are those of the public ``linear_cross_entropy``."""
    if has_idle:
        hidden, targets = hidden[targets >= 0], targets[targets >= 0]
    logits = _logits(hidden, weight, bias, logit_scale, softcap)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    return loss / divisor


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return (N,); the arguments are those of the public ``linear_log_probs``."""
    logits = _logits(hidden, weight, bias, logit_scale, softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, logit_scale: float, softcap: float | None
) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
