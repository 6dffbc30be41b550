"""Rotary embedding in place, and norm + rotation with its backward, as Triton kernels over the heads of a token.

Same functions and arguments as ``cpu.py``. A head is held in three pieces: the two halves that turn into each other,
and what lies behind them where the rotation is partial. Everything is computed in float32 and rounded once.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (A kernel's language is no typed Python, and triton is installed where there is a GPU only.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["norm_rotate", "norm_rotate_backward", "rotate_"]

# Values of one piece in a program: heads times half the rotated size. Untuned.
_MOST_VALUES = 2048


def _heads_of(count: int, half: int) -> tuple[int, int]:
    """Return the heads of a program and the padded half, both powers of two."""
    padded = triton.next_power_of_2(half)
    return min(triton.next_power_of_2(count), max(1, _MOST_VALUES // padded)), padded


@triton.jit
def _rotate_kernel(
    heads,
    cos,
    sin,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    count,
    half,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """BLOCK_H of the H = ``count`` heads of token t of heads (T, H, E); cos, sin (T, Er); grid (T, H / BLOCK_H)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_HALF)
    inside = (head < count)[:, None] & (pair < half)[None, :]
    c = tl.load(cos + token * cos_stride + pair, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + pair, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    place = heads + token * token_stride + head[:, None].to(tl.int64) * head_stride + pair[None, :]
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (a * c - b * s).to(heads.dtype.element_ty), mask=inside)
    tl.store(place + half, (b * c + a * s).to(heads.dtype.element_ty), mask=inside)


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False) -> None:
    """Rotate ``heads`` (T, H, E) in place by ``cos`` and ``sin`` (T, Er), backwards where ``inverse``."""
    tokens, count, _ = heads.shape
    half = cos.shape[-1] // 2
    taken, padded = _heads_of(count, half)
    with torch.cuda.device_of(heads):
        _rotate_kernel[(tokens, triton.cdiv(count, taken))](
            heads, cos, sin, heads.stride(0), heads.stride(1), cos.stride(0), sin.stride(0), count, half,
            INVERSE=inverse, BLOCK_H=taken, BLOCK_HALF=padded, num_warps=4,
        )  # fmt: skip


@triton.jit
def _norm_rotate_kernel(
    heads,
    weight,
    cos,
    sin,
    out,
    rstd,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    out_token_stride,
    out_head_stride,
    count,
    half,
    size,
    eps,
    offset,
    HAS_REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """BLOCK_H of the H heads of token t of heads and out (T, H, E), E = ``size``; rstd (T, H); grid as above."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_HALF)
    within = pair < half
    inside = (head < count)[:, None] & within[None, :]
    source = heads + token * token_stride + head[:, None].to(tl.int64) * head_stride
    target = out + token * out_token_stride + head[:, None].to(tl.int64) * out_head_stride
    a = tl.load(source + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
    behind = 2 * half + tl.arange(0, BLOCK_REST)
    inside_rest = (head < count)[:, None] & (behind < size)[None, :]
    if HAS_REST:
        rest = tl.load(source + behind[None, :], mask=inside_rest, other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, 1)
    inverse = tl.rsqrt(squares / size + eps)
    tl.store(rstd + token * count + head, inverse, mask=head < count)
    a *= inverse[:, None] * (tl.load(weight + pair, mask=within, other=0.0).to(tl.float32) + offset)[None, :]
    b *= inverse[:, None] * (tl.load(weight + half + pair, mask=within, other=0.0).to(tl.float32) + offset)[None, :]
    c = tl.load(cos + token * cos_stride + pair, mask=within, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + pair, mask=within, other=0.0).to(tl.float32)[None, :]
    tl.store(target + pair[None, :], (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + half + pair[None, :], (b * c + a * s).to(out.dtype.element_ty), mask=inside)
    if HAS_REST:
        rest *= (
            inverse[:, None]
            * (tl.load(weight + behind, mask=behind < size, other=0.0).to(tl.float32) + offset)[None, :]
        )
        tl.store(target + behind[None, :], rest.to(out.dtype.element_ty), mask=inside_rest)


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
    """Write each head of ``heads`` (T, H, E), normalized and rotated, to ``out``; return rstd (T, H) in float32."""
    tokens, count, size = heads.shape
    half = cos.shape[-1] // 2
    taken, padded = _heads_of(count, half)
    rstd = torch.empty(tokens, count, dtype=torch.float32, device=heads.device)
    with torch.cuda.device_of(heads):
        _norm_rotate_kernel[(tokens, triton.cdiv(count, taken))](
            heads, weight, cos, sin, out, rstd,
            heads.stride(0), heads.stride(1), cos.stride(0), sin.stride(0), out.stride(0), out.stride(1),
            count, half, size, float(eps), float(offset), HAS_REST=size > 2 * half,
            BLOCK_H=taken, BLOCK_HALF=padded, BLOCK_REST=_padded_rest(size, half), num_warps=4,
        )  # fmt: skip
    return rstd


def _padded_rest(size: int, half: int) -> int:
    return triton.next_power_of_2(max(1, size - 2 * half))


@triton.jit
def _norm_rotate_backward_kernel(
    dout,
    heads,
    weight,
    rstd,
    cos,
    sin,
    out,
    parts,
    dout_token_stride,
    dout_head_stride,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    out_token_stride,
    out_head_stride,
    count,
    half,
    size,
    offset,
    HAS_REST: tl.constexpr,
    WANT_WEIGHT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """As the forward, with dout (T, H, E); parts (T * grid[1], E) gets a program's share of the weight's gradient."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_HALF)
    within = pair < half
    inside = (head < count)[:, None] & within[None, :]
    incoming = dout + token * dout_token_stride + head[:, None].to(tl.int64) * dout_head_stride
    source = heads + token * token_stride + head[:, None].to(tl.int64) * head_stride
    target = out + token * out_token_stride + head[:, None].to(tl.int64) * out_head_stride
    part = parts + (token * tl.num_programs(1) + tl.program_id(1)) * size
    behind = 2 * half + tl.arange(0, BLOCK_REST)
    inside_rest = (head < count)[:, None] & (behind < size)[None, :]
    c = tl.load(cos + token * cos_stride + pair, mask=within, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + pair, mask=within, other=0.0).to(tl.float32)[None, :]
    turned_a = tl.load(incoming + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    turned_b = tl.load(incoming + half + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    grad_a = turned_a * c + turned_b * s
    grad_b = turned_b * c - turned_a * s
    inverse = tl.load(rstd + token * count + head, mask=head < count, other=0.0)[:, None]
    a = tl.load(source + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    if WANT_WEIGHT:
        tl.store(part + pair, tl.sum(grad_a * a * inverse, 0), mask=within)
        tl.store(part + half + pair, tl.sum(grad_b * b * inverse, 0), mask=within)
    grad_a *= (tl.load(weight + pair, mask=within, other=0.0).to(tl.float32) + offset)[None, :]
    grad_b *= (tl.load(weight + half + pair, mask=within, other=0.0).to(tl.float32) + offset)[None, :]
    products = tl.sum(grad_a * a, 1) + tl.sum(grad_b * b, 1)
    if HAS_REST:
        rest = tl.load(source + behind[None, :], mask=inside_rest, other=0.0).to(tl.float32)
        grad_rest = tl.load(incoming + behind[None, :], mask=inside_rest, other=0.0).to(tl.float32)
        if WANT_WEIGHT:
            tl.store(part + behind, tl.sum(grad_rest * rest * inverse, 0), mask=behind < size)
        grad_rest *= (tl.load(weight + behind, mask=behind < size, other=0.0).to(tl.float32) + offset)[None, :]
        products += tl.sum(grad_rest * rest, 1)
    share = inverse * inverse * (products / size)[:, None]
    # The sums needed whole heads, so all of them have been read: ``out`` may lie on dout.
    tl.store(target + pair[None, :], (inverse * (grad_a - a * share)).to(out.dtype.element_ty), mask=inside)
    tl.store(target + half + pair[None, :], (inverse * (grad_b - b * share)).to(out.dtype.element_ty), mask=inside)
    if HAS_REST:
        result = inverse * (grad_rest - rest * share)
        tl.store(target + behind[None, :], result.to(out.dtype.element_ty), mask=inside_rest)


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
    """Write the gradient of ``heads`` (T, H, E) to ``out``, which may be ``dout``; add the weight's to ``dweight``.

    With ``dweight`` a float32 row of E is kept for each program until all are summed.
    """
    tokens, count, size = heads.shape
    half = cos.shape[-1] // 2
    taken, padded = _heads_of(count, half)
    grid = (tokens, triton.cdiv(count, taken))
    rows = grid[0] * grid[1] if dweight is not None else 0
    parts = torch.empty(rows, size, dtype=torch.float32, device=heads.device)
    with torch.cuda.device_of(heads):
        _norm_rotate_backward_kernel[grid](
            dout, heads, weight, rstd.contiguous(), cos, sin, out, parts,
            dout.stride(0), dout.stride(1), heads.stride(0), heads.stride(1), cos.stride(0), sin.stride(0),
            out.stride(0), out.stride(1), count, half, size, float(offset),
            HAS_REST=size > 2 * half, WANT_WEIGHT=dweight is not None,
            BLOCK_H=taken, BLOCK_HALF=padded, BLOCK_REST=_padded_rest(size, half), num_warps=4,
        )  # fmt: skip
    if dweight is not None:
        dweight += parts.sum(0)
    return out
