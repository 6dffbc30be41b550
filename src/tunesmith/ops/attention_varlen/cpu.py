"""Blocked causal attention over batches of documents and its backward, in plain torch.

Documents of like length are computed together as one batch of matrix products, the longest first, padded behind their
last token: causality already hides what comes after. Queries are cut into blocks; a block has the documents that reach
into it, and sees the keys from the start of its window to its own last token, so that most of the upper half of the
score matrix is not computed. Heads that share a key head are rows of one product: the queries of a position lie side by
side, (positions, heads that share) by E.

In 16 bits lengths are rounded up to a multiple of 32: there a CPU's matrix library prepares a kernel for every
new shape, and lengths as they come are nearly all new. The softmax runs in torch's own kernels, which widen within the
registers.

With S = scale Q K^T, P = softmax(S) and O = P V, the backward is

    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(P * dP))      dQ = scale dS K      dK = scale dS^T Q

(Dao et al. 2022, arXiv:2205.14135, appendix B.2). P is computed again from Q and K: one fused softmax is cheaper than
keeping log-sum-exps and going over the scores three times. With a softcap c, S is c tanh(S / c), and dS gets the factor
1 - (S / c)^2.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch

from tunesmith.ops.attention_varlen.documents import Lengths, host_lengths
from tunesmith.ops.rows import wide_dtype
from tunesmith.ops.scripted import scripted

__all__ = ["Group", "backward", "forward", "groups_of", "sizes_for"]

_MOST_SCORES = 4 * 2**20
"""Scores of one product at most: 16 MB in float32, so that a batch of documents stays near the cache."""

_STEP = 32
# Rows of one block of queries: positions times heads that share a key head.
_BLOCK = 64
# 85 + 202 ms where blocks of 64 took 89 + 235 (one core with AVX2, float32, chats, 9/3 heads of 64).
_LEAST_POSITIONS = 32
# Matrix units of 16 bits want more rows.
_BLOCK_16, _LEAST_POSITIONS_16 = 128, 64


@dataclass(frozen=True, slots=True)
class Group:
    """Documents computed together, each in a row of a grid (documents, length): first tokens and lengths.

    The longest comes first.
    """

    starts: list[int]
    lengths: list[int]
    length: int


@functools.lru_cache(maxsize=8)
def groups_of(lengths: tuple[int, ...], heads: int, step: int, block: int) -> tuple[Group, ...]:
    """Return documents together, the longest first, none shorter than half of its grid.

    A product has at most ``_MOST_SCORES`` scores. ``step`` and ``block`` are those of :func:`sizes_for`.
    """
    starts = [end - length for length, end in zip(lengths, itertools.accumulate(lengths), strict=True)]
    rest = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    groups: list[Group] = []
    while rest:
        length = -(-lengths[rest[0]] // step) * step
        most = max(1, _MOST_SCORES // (heads * min(length, block) * length))
        chosen = [i for i in rest[:most] if 2 * -(-lengths[i] // block) * block >= length]
        rest = rest[len(chosen) :]
        groups.append(Group([starts[i] for i in chosen], [lengths[i] for i in chosen], length))
    return tuple(groups)


def sizes_for(itemsize: int, sharing: int) -> tuple[int, int]:
    """Return of what lengths are made a multiple, and the positions of a block.

    Args:
        itemsize: bytes of a value.
        sharing: query heads of a key head.
    """
    if itemsize > 2:
        return 1, max(_LEAST_POSITIONS, _BLOCK // sharing)
    return _STEP, max(_LEAST_POSITIONS_16, _BLOCK_16 // sharing)


def _split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the part of ``scale`` for the queries, and the part for the scores.

    Queries are scaled where that rounds nothing more: in 32 bits and above, or by a power of two.
    """
    return (scale, 1.0) if dtype.itemsize > 2 or math.frexp(scale)[0] == 0.5 else (1.0, scale)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return (T, H, E') of ``query`` (T, H, E), ``key`` (T, K, E), ``value`` (T, K, E'), and nothing to keep for later.

    All may be strided.
    """
    heads, wide = query.shape[1], wide_dtype(query.dtype)
    step, block = sizes_for(query.dtype.itemsize, heads // key.shape[1])
    before, behind = _split_scale(scale, query.dtype)
    out = query.new_empty(len(query), heads, value.shape[2]) if out is None else out
    for group in groups_of(host_lengths(lengths), heads, step, block):
        _forward(query, key, value, out, group.starts, group.lengths, group.length, block, before, behind, window,
                 softcap, wide)  # fmt: skip
    return out, ()


def backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    kept: tuple[torch.Tensor, ...],
    lengths: Lengths,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dquery: torch.Tensor,
    dkey: torch.Tensor,
    dvalue: torch.Tensor,
) -> None:
    """Write the gradients of query, key and value to ``dquery``, ``dkey`` and ``dvalue``, of their shapes.

    ``out`` and ``kept`` are what forward returned; nothing of them is needed here.
    """
    heads, wide = query.shape[1], wide_dtype(query.dtype)
    step, block = sizes_for(query.dtype.itemsize, heads // key.shape[1])
    before, behind = _split_scale(scale, query.dtype)
    for group in groups_of(host_lengths(lengths), heads, step, block):
        _backward(dout, query, key, value, dquery, dkey, dvalue, group.starts, group.lengths, group.length, block,
                  before, behind, window, softcap, wide)  # fmt: skip


def _gather(x: torch.Tensor, sharing: int, starts: list[int], lengths: list[int], length: int) -> torch.Tensor:
    """Return (documents * K, length * sharing, E) of ``x`` (T, K * sharing, E), padded with 0."""
    x = x.unflatten(1, (-1, sharing)).transpose(0, 1)
    grid = x.new_zeros((len(starts), x.size(0), length, sharing, x.size(3)))
    for i in range(len(starts)):
        grid[i, :, : lengths[i]].copy_(x[:, starts[i] : starts[i] + lengths[i]])
    return grid.flatten(2, 3).flatten(0, 1)


def _scatter(heads: torch.Tensor, out: torch.Tensor, sharing: int, starts: list[int], lengths: list[int]) -> None:
    """Write ``heads`` (documents * K, length * sharing, E) to their rows of ``out`` (T, K * sharing, E)."""
    grid = heads.unflatten(0, (len(starts), -1)).unflatten(2, (-1, sharing)).transpose(1, 2)
    rows = out.unflatten(1, (-1, sharing))
    for i in range(len(starts)):
        rows[starts[i] : starts[i] + lengths[i]].copy_(grid[i, : lengths[i]])


def _reach(first: int, block: int, length: int, window: int | None, lengths: list[int]) -> tuple[int, int, int]:
    """Return how many documents reach into the block of queries from ``first`` on, its first key and its end."""
    begin = 0 if window is None else max(0, first - window + 1)
    return sum([int(own > first) for own in lengths]), begin, min(first + block, length)


def _hidden(rows: int, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Return (rows, keys), -inf where a query may not look and else 0; the last query is at the last key."""
    behind = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)[None, :]
    hidden = behind < 0
    if window is not None:
        hidden = hidden | (behind >= window)
    return torch.zeros((rows, keys), dtype=like.dtype).masked_fill_(hidden, -math.inf).to(like.device)


def _weights(
    queries: torch.Tensor,
    keys: torch.Tensor,
    square: torch.Tensor,
    sharing: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    wide: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return P (heads, positions * sharing, keys) and, with a softcap, the slope of the cap.

    P is in 16 bits where S, as the product rounds it, is all there is to know. ``square`` is what a whole block hides
    of its own keys.
    """
    scores = torch.bmm(queries, keys.transpose(1, 2))
    if softcap is not None or scale != 1.0:
        scores = scores.to(wide)
    if scale != 1.0:
        scores.mul_(scale)
    slope: torch.Tensor | None = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        slope = 1 - scores * scores
        scores.mul_(softcap)
    rows, count = queries.size(1) // sharing, keys.size(1)
    grid = scores.unflatten(1, (rows, sharing))
    if window is None:
        grid[:, :, :, count - rows :].add_(square[:rows, :rows].unsqueeze(1))
    else:
        grid.add_(_hidden(rows, count, window, scores).unsqueeze(1))
    return torch.softmax(scores, -1), slope


@scripted
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    length: int,
    block: int,
    before: float,
    behind: float,
    window: int | None,
    softcap: float | None,
    wide: torch.dtype,
) -> None:
    """Write the rows of one group to ``out``."""
    key_heads = key.size(1)
    sharing = query.size(1) // key_heads
    q = _gather(query, sharing, starts, lengths, length)
    k, v = _gather(key, 1, starts, lengths, length), _gather(value, 1, starts, lengths, length)
    if before != 1.0:
        q.mul_(before)
    found = q.new_empty((q.size(0), q.size(1), v.size(2)))
    square = _hidden(block, block, None, q)
    for first in range(0, length, block):
        documents, begin, end = _reach(first, block, length, window, lengths)
        count = documents * key_heads
        queries = q[:count, first * sharing : end * sharing]
        weights, _ = _weights(queries, k[:count, begin:end], square, sharing, behind, window, softcap, wide)
        rows = found[:count, first * sharing : end * sharing]
        torch.bmm(weights.to(v.dtype), v[:count, begin:end], out=rows)
    _scatter(found, out, sharing, starts, lengths)


@scripted
def _backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dquery: torch.Tensor,
    dkey: torch.Tensor,
    dvalue: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    length: int,
    block: int,
    before: float,
    behind: float,
    window: int | None,
    softcap: float | None,
    wide: torch.dtype,
) -> None:
    """Write the gradients of one group to ``dquery``, ``dkey`` and ``dvalue``."""
    key_heads = key.size(1)
    sharing = query.size(1) // key_heads
    q, d_found = _gather(query, sharing, starts, lengths, length), _gather(dout, sharing, starts, lengths, length)
    k, v = _gather(key, 1, starts, lengths, length), _gather(value, 1, starts, lengths, length)
    if before != 1.0:
        q.mul_(before)
    dq = torch.empty_like(q)
    # In float32 at least: in 16 bits late blocks would be rounded away.
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    square = _hidden(block, block, None, q)
    for first in range(0, length, block):
        documents, begin, end = _reach(first, block, length, window, lengths)
        count = documents * key_heads
        queries = q[:count, first * sharing : end * sharing]
        keys, d_part = k[:count, begin:end], d_found[:count, first * sharing : end * sharing]
        weights, slope = _weights(queries, keys, square, sharing, behind, window, softcap, wide)
        dv[:count, begin:end].add_(torch.bmm(weights.to(v.dtype).transpose(1, 2), d_part))
        d_weights = torch.bmm(d_part, v[:count, begin:end].transpose(1, 2)).to(weights.dtype)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        if slope is not None:
            d_scores.mul_(slope)
        if behind != 1.0:
            d_scores.mul_(behind)
        d_scores = d_scores.to(q.dtype)
        rows = dq[:count, first * sharing : end * sharing]
        torch.bmm(d_scores, keys, out=rows)
        dk[:count, begin:end].add_(torch.bmm(d_scores.transpose(1, 2), queries))
    if before != 1.0:
        dq.mul_(before)
    _scatter(dq, dquery, sharing, starts, lengths)
    _scatter(dk, dkey, 1, starts, lengths)
    _scatter(dv, dvalue, 1, starts, lengths)
