"""Rotary embedding in place, and norm + rotation with its backward, in plain torch, blocked over tokens.

A pair (a, b) of the first and second half turns by the angle of its position:

    a' = a cos - b sin        b' = b cos + a sin

The rotation is orthogonal up to the scale that cos and sin may carry: the backward is the same with -sin.
"""

from __future__ import annotations

import torch

from tunesmith.ops.rms_norm import cpu as rms_norm
from tunesmith.ops.rows import block_rows, wide_dtype
from tunesmith.ops.scripted import scripted

__all__ = ["norm_rotate", "norm_rotate_backward", "rotate_"]


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False) -> None:
    """Rotate ``heads`` (T, H, E) in place by ``cos`` and ``sin`` (T, Er), backwards where ``inverse``."""
    _, count, size = heads.shape
    wide = wide_dtype(heads.dtype)
    _rotate(heads, cos, sin, -1.0 if inverse else 1.0, wide, block_rows(count * size, wide.itemsize))


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


@scripted
def _rotate(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float, wide: torch.dtype, step: int
) -> None:
    """Rotate in place by ``sign`` times the angles, ``step`` tokens at a time."""
    tokens, half = heads.size(0), cos.size(-1) // 2
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        c, s = cos[start:end, None, :half].to(wide), sin[start:end, None, :half].to(wide)
        first, second = heads[start:end, :, :half], heads[start:end, :, half : 2 * half]
        a, b = first.to(wide), second.to(wide)
        lower, upper = b * c, a * c
        lower.addcmul_(a, s, value=sign)
        first.copy_(upper.addcmul_(b, s, value=-sign))
        second.copy_(lower)
