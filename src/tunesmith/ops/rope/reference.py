"""Rotary position embedding in plain torch, with the norm per head that some families put before it."""

from __future__ import annotations

import torch

from tunesmith.ops.rms_norm.reference import rms_norm

__all__ = ["norm_rotate", "rotate"]


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return (T, H, E): the first Er entries of each head rotated, the others as they are."""
    size = cos.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
    return torch.cat([turned * cos[:, None] + half * sin[:, None], rest], dim=-1)


def norm_rotate(
    heads: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Return (T, H, E): each head normalized over E, then rotated."""
    return rotate(rms_norm(heads, weight, eps=eps, offset=offset), cos, sin)
