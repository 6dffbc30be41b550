"""Rotary embedding in place, and norm + rotation with its backward, in plain torch, blocked over tokens.

A pair (a, b) of the first and second half turns by the angle of its position:

    a' = a cos - b sin        b' = b cos + a sin

The rotation is orthogonal up to the scale that cos and sin may carry: the backward is the same with -sin.
"""

from __future__ import annotations

import torch

from tunesmith.ops.rms_norm import cpu as rms_norm
from tunesmith.ops.rows import row_blocks, wide_dtype

__all__ = ["norm_rotate", "norm_rotate_backward", "rotate_"]


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False) -> None:
    """Rotate ``heads`` (T, H, E) in place by ``cos`` and ``sin`` (T, Er), backwards where ``inverse``."""
    tokens, count, size = heads.shape
    half, wide = cos.shape[-1] // 2, wide_dtype(heads.dtype)
    sign = -1.0 if inverse else 1.0
    for part in row_blocks(tokens, count * size, wide.itemsize):
        c, s = cos[part, None, :half].to(wide), sin[part, None, :half].to(wide)
        first, second = heads[part, :, :half], heads[part, :, half : 2 * half]
        a, b = first.to(wide), second.to(wide)
        lower = b * c
        lower.addcmul_(a, s, value=sign)
        upper = a * c
        first.copy_(upper.addcmul_(b, s, value=-sign))
        second.copy_(lower)


def norm_rotate(
    heads: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    offset: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write each head of ``heads`` (T, H, E), normalized and rotated, to ``out``; return rstd (T, H)."""
    tokens, count, size = heads.shape
    h, _, rstd = rms_norm.forward(heads.reshape(-1, size), weight, eps=eps, offset=offset)
    normed = h.view(tokens, count, size)
    rotate_(normed, cos, sin)
    out.copy_(normed)
    return rstd.view(tokens, count)


def norm_rotate_backward(
    dout: torch.Tensor,
    heads: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    offset: float,
    out: torch.Tensor,
    dweight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the gradient of ``heads`` (T, H, E) to ``out``, which may be ``dout``; add the weight's to ``dweight``."""
    size = heads.shape[-1]
    grad = dout.clone(memory_format=torch.contiguous_format)
    rotate_(grad, cos, sin, inverse=True)
    flat, before, inverse = grad.view(-1, size), heads.reshape(-1, size), rstd.reshape(-1)
    if dweight is not None:
        dweight += rms_norm.weight_gradient(flat, before, inverse)
    out.copy_(rms_norm.backward(flat, before, weight, inverse, offset=offset, out=flat).view(heads.shape))
    return out
