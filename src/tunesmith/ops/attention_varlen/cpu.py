"""Blocked causal attention over batches of documents and its backward, in plain torch.

Documents of nearly equal length are computed together as one batch of matrix products, padded behind their last token:
causality already hides what comes after. Queries are cut into blocks; a block sees the keys from the start of its
window to its own last token, so that most of the upper half of the score matrix is not computed. Heads that share a key
head are rows of one product: the queries of a position lie side by side, (positions, heads that share) by E.

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
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tunesmith.ops.attention_varlen.documents import Lengths, host_lengths
from tunesmith.ops.rows import wide_dtype

__all__ = ["MOST_SCORES", "backward", "forward", "sizes_for"]

MOST_SCORES = 4 * 2**20
"""Scores of one product at most: 16 MB in float32, so that a batch of documents stays near the cache."""

_STEP = 32
# Rows of one block of queries: positions times heads that share a key head.
_BLOCK = 64
# 85 + 202 ms where blocks of 64 took 89 + 235 (one core with AVX2, float32, chats, 9/3 heads of 64).
_LEAST_POSITIONS = 32
# Matrix units of 16 bits want more rows.
_BLOCK_16, _LEAST_POSITIONS_16 = 128, 64


@dataclass(frozen=True, slots=True)
class _Group:
    """Documents computed together, each in a row of a grid (documents, length), the longest first.

    ``members`` are their first tokens and lengths. ``start`` is the first token of all where they fill the grid without
    gaps: one copy then does for all.
    """

    members: tuple[tuple[int, int], ...]
    length: int
    block: int
    start: int | None

    @property
    def documents(self) -> int:
        return len(self.members)

    def heads(self, x: torch.Tensor, sharing: int = 1) -> torch.Tensor:
        """Return (documents * K, length * sharing, E) of ``x`` (T, K * sharing, E), padded with 0."""
        x = x.unflatten(1, (-1, sharing))
        shape = (self.documents, x.shape[1], self.length, *x.shape[2:])
        if self.start is not None:
            out = x.new_empty(shape).copy_(self._view(x).transpose(1, 2))
        else:
            out, x = x.new_zeros(shape), x.transpose(0, 1)
            for row, (begin, length) in zip(out, self.members, strict=True):
                row[:, :length] = x[:, begin : begin + length]
        return out.flatten(2, 3).flatten(0, 1)

    def blocks(self, window: int | None) -> Iterator[tuple[int, int, int, int]]:
        """Yield (documents, first key, first query, end) of every block of queries.

        The first ``documents`` of the grid reach into the block; their keys and queries both stop before ``end``.
        """
        for first in range(0, self.length, self.block):
            reaching = sum(length > first for _, length in self.members)
            yield reaching, (0 if window is None else max(0, first - window + 1)), first, min(first + self.block, self.length)

    def positions(self, heads: torch.Tensor, sharing: int = 1) -> torch.Tensor:
        """Return (documents, positions, K, sharing, E), a view, of (documents * K, positions * sharing, E)."""
        return heads.unflatten(0, (self.documents, -1)).unflatten(2, (-1, sharing)).transpose(1, 2)

    def write(self, heads: torch.Tensor, out: torch.Tensor, sharing: int = 1) -> None:
        """Write ``heads`` (documents * K, length * sharing, E) to their rows of ``out`` (T, K * sharing, E)."""
        grid, out = self.positions(heads, sharing), out.unflatten(1, (-1, sharing))
        if self.start is not None:
            self._view(out).copy_(grid)
        else:
            for row, (begin, length) in zip(grid, self.members, strict=True):
                out[begin : begin + length] = row[:length]

    def _view(self, x: torch.Tensor) -> torch.Tensor:
        assert self.start is not None
        return x[self.start : self.start + self.documents * self.length].unflatten(0, (self.documents, self.length))


@functools.lru_cache(maxsize=8)
def _groups(lengths: tuple[int, ...], heads: int, step: int, block: int) -> tuple[_Group, ...]:
    """Return documents together, the longest first, none shorter than half of its grid.

    A product has at most ``MOST_SCORES`` scores.
    """
    starts = (end - length for length, end in zip(lengths, itertools.accumulate(lengths), strict=True))
    rest = sorted(((start, length) for start, length in zip(starts, lengths, strict=True) if length), key=lambda m: -m[1])
    groups: list[_Group] = []
    while rest:
        length = -(-rest[0][1] // step) * step
        most = max(1, MOST_SCORES // (heads * min(length, block) * length))
        chosen = tuple(member for member in rest[:most] if 2 * -(-member[1] // block) * block >= length)
        rest = rest[len(chosen) :]
        begin = chosen[0][0]
        is_full = all(member == (begin + i * length, length) for i, member in enumerate(chosen))
        groups.append(_Group(chosen, length, block, begin if is_full else None))
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


@functools.lru_cache(maxsize=64)
def _hidden(rows: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return (rows, keys), -inf where a query may not look and else 0; the last query is at the last key."""
    behind = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)[None, :]
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    return torch.zeros(rows, keys, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)


def _split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the part of ``scale`` for the queries, and the part for the scores.

    Queries are scaled where that rounds nothing more: in 32 bits and above, or by a power of two.
    """
    return (scale, 1.0) if dtype.itemsize > 2 or math.frexp(scale)[0] == 0.5 else (1.0, scale)


def _weights(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    buffer: torch.Tensor,
    sharing: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return P (heads, positions * sharing, keys) and, with a softcap, the slope of the cap.

    P is in 16 bits where S, as the product rounds it, is all there is to know.
    """
    scores = _product(queries, keys.transpose(1, 2), buffer)
    if softcap is not None or scale != 1.0:
        scores = scores.to(wide_dtype(queries.dtype))
    if scale != 1.0:
        scores = scores.mul_(scale)
    slope = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        slope = 1 - scores * scores
        scores = scores.mul_(softcap)
    rows, count = queries.shape[1] // sharing, keys.shape[1]
    # Without a window only the square below the last ``rows`` keys holds something to hide.
    seen = 0 if window is not None else count - rows
    hidden = _hidden(rows, count - seen, window, scores.dtype, keys.device)
    scores.unflatten(1, (rows, sharing))[..., seen:].add_(hidden[:, None])
    return torch.softmax(scores, -1), slope


def _product(a: torch.Tensor, b: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Return a b in the front of ``buffer``."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return torch.bmm(a, b, out=buffer[: math.prod(shape)].view(shape))


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
    heads, key_heads = query.shape[1], key.shape[1]
    sharing = heads // key_heads
    (before, behind), (step, block) = _split_scale(scale, query.dtype), sizes_for(query.dtype.itemsize, sharing)
    out = query.new_empty(len(query), heads, value.shape[2]) if out is None else out
    for group in _groups(host_lengths(lengths), heads, step, block):
        q, k, v = group.heads(query, sharing), group.heads(key), group.heads(value)
        q = q.mul_(before) if before != 1.0 else q
        buffer = q.new_empty(group.documents * heads * min(block, group.length) * group.length)
        found = q.new_empty(len(q), q.shape[1], v.shape[2])
        for documents, first_key, first, end in group.blocks(window):
            seen, rows = slice(documents * key_heads), slice(first * sharing, end * sharing)
            weights, _ = _weights(q[seen, rows], k[seen, first_key:end], behind, window, softcap, buffer, sharing)
            torch.bmm(weights.to(q.dtype), v[seen, first_key:end], out=found[seen, rows])
        group.write(found, out, sharing)
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
    heads, key_heads = query.shape[1], key.shape[1]
    sharing, wide = heads // key_heads, wide_dtype(query.dtype)
    (before, behind), (step, block) = _split_scale(scale, query.dtype), sizes_for(query.dtype.itemsize, sharing)
    for group in _groups(host_lengths(lengths), heads, step, block):
        q, d_found = group.heads(query, sharing), group.heads(dout, sharing)
        k, v = group.heads(key), group.heads(value)
        q = q.mul_(before) if before != 1.0 else q
        size = group.documents * heads * min(block, group.length) * group.length
        for_scores, for_slopes = q.new_empty(size), q.new_empty(size)
        dq = torch.empty_like(q)
        # In float32 at least: in 16 bits late blocks would be rounded away.
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for documents, first_key, first, end in group.blocks(window):
            seen, rows = slice(documents * key_heads), slice(first * sharing, end * sharing)
            keys, queries, d_part = k[seen, first_key:end], q[seen, rows], d_found[seen, rows]
            weights, slope = _weights(queries, keys, behind, window, softcap, for_scores, sharing)
            dv[seen, first_key:end].add_(torch.bmm(weights.to(v.dtype).transpose(1, 2), d_part))
            d_weights = _product(d_part, v[seen, first_key:end].transpose(1, 2), for_slopes).to(weights.dtype)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if slope is not None:
                d_scores = d_scores.mul_(slope)
            if behind != 1.0:
                d_scores = d_scores.mul_(behind)
            d_scores = d_scores.to(q.dtype)
            torch.bmm(d_scores, keys, out=dq[seen, rows])
            dk[seen, first_key:end].add_(torch.bmm(d_scores.transpose(1, 2), queries))
        group.write(dq.mul_(before) if before != 1.0 else dq, dquery, sharing)
        group.write(dk, dkey)
        group.write(dv, dvalue)
