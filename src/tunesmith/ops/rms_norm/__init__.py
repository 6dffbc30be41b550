"""Root mean square normalization over the last axis.

``reference.py`` is the definition, ``function.py`` the autograd function, ``cpu.py`` and ``triton.py`` its primitives.
"""

from __future__ import annotations

import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.rms_norm import reference
from tunesmith.ops.rms_norm.function import RMSNorm

__all__ = ["reference", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Return ``x * rsqrt(mean(x^2) + eps) * (weight + offset)`` over the last axis.

    Equals :func:`reference.rms_norm`; computes in float32 (float64 for float64) and rounds once, where transformers'
    Llama rounds before it multiplies by the weight. Saves ``x`` and one number a row.

    Args:
        x: (..., D), any floating dtype.
        weight: (D,); gets its gradient where it wants one.
        eps: added to the mean square.
        offset: 1.0 for the Gemma families, whose weight is stored less one.
    Raises:
        ShapeError: the last axis of ``x`` is not that of ``weight``.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467. Backward derived in ``cpu.py``.
    """
    if weight.shape != x.shape[-1:]:
        raise ShapeError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: (..., D) and (D,) are needed"
        )
    return RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, offset).view(x.shape)  # type: ignore[no-any-return]
