"""Rotary position embedding, alone or behind the norm per head of Qwen 3 and Gemma 3.

``reference.py`` is the definition, ``function.py`` the autograd functions, ``cpu.py`` and ``triton.py`` the primitives.
"""

from __future__ import annotations

import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.rope import reference
from tunesmith.ops.rope.function import NormRotate, Rotate

__all__ = ["norm_rotate", "reference", "rotate"]


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return ``heads`` turned by their positions, halves paired as in transformers' Llama.

    Equals :func:`reference.rotate`; computes in float32 (float64 for float64) and rounds once.

    Args:
        heads: (T, H, E); may be strided.
        cos, sin: (T, Er) with Er <= E, even, both halves alike; entries of a head past Er stay as they are.
    Raises:
        ShapeError: the tables do not fit the heads.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    _check(heads, cos, sin)
    return Rotate.apply(heads, cos, sin)  # type: ignore[no-any-return]


def norm_rotate(
    heads: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Return ``heads`` normalized over E (see :func:`tunesmith.ops.rms_norm.rms_norm`), then rotated.

    Raises:
        ShapeError: tables or weight do not fit the heads.
    """
    _check(heads, cos, sin)
    if weight.shape != heads.shape[-1:]:
        raise ShapeError(f"heads {tuple(heads.shape)} and weight {tuple(weight.shape)} do not fit: (E,) is needed")
    return NormRotate.apply(heads, weight, cos, sin, eps, offset)  # type: ignore[no-any-return]


def _check(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    fits = cos.shape == sin.shape and len(cos) == len(heads) and cos.shape[1] <= heads.shape[2] and not cos.shape[1] % 2
    if heads.ndim != 3 or cos.ndim != 2 or not fits:
        raise ShapeError(
            f"heads {tuple(heads.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit: "
            "(T, H, E) and twice (T, Er) with an even Er <= E are needed"
        )
