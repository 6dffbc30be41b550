"""Cross-entropy and log-probabilities of the vocabulary projection without keeping logits.

``reference.py`` is the definition; ``function.py`` goes over the rows chunk by chunk; ``cpu.py`` and ``triton.py`` turn
a chunk of logits into losses and gradients.
"""

from __future__ import annotations

import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.linear_cross_entropy import reference
from tunesmith.ops.linear_cross_entropy.function import Head, LinearCrossEntropy, LinearLogProbs

__all__ = ["linear_cross_entropy", "linear_log_probs", "reference"]


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
    """Return ``sum(cross_entropy(logits, targets)) / divisor``, ``logits = cap(scale * (hidden @ weight.T + bias))``.

    Equals :func:`reference.linear_cross_entropy`; holds the logits of one chunk of rows at a time and no logits for the
    backward. Give only the rows that carry a label; where their number is fixed beforehand, the others may be idle.

    Args:
        hidden: (N, D) float32, bfloat16, float16 or float64; N may be 0 (the loss is then 0 with a graph).
        weight: (V, D), same dtype; gets a gradient, summed in float32, only where it requires one.
        targets: (N,) int64 in [0, V); with ``has_idle`` -100 too.
        divisor: the number of trained tokens of the whole optimizer step, over all micro-batches and processes.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        label_smoothing: share of the label that is spread over all V classes (Szegedy et al. 2016, arXiv:1512.00567).
        has_idle: rows whose target is -100 give no loss and a gradient of exactly zero, whatever their logits are.
    Returns:
        A scalar in float32 (float64 for float64 input).
    Raises:
        ShapeError: the shapes do not fit.
    """
    _check(hidden, weight, targets)
    head = Head(logit_scale, softcap, label_smoothing, has_idle)
    return LinearCrossEntropy.apply(hidden, weight, bias, targets, divisor, head)  # type: ignore[no-any-return]


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return the log-probability of each target, as preference and policy-gradient losses need it.

    Equals :func:`reference.linear_log_probs`; memory and arguments as in :func:`linear_cross_entropy`.

    Returns:
        (N,) in float32 (float64 for float64 input); each row may get a gradient of its own.
    Raises:
        ShapeError: the shapes do not fit.
    """
    _check(hidden, weight, targets)
    return LinearLogProbs.apply(hidden, weight, bias, targets, Head(logit_scale, softcap))  # type: ignore[no-any-return]


def _check(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ShapeError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} differ: "
            "(N, D), (V, D) and (N,) are needed"
        )
