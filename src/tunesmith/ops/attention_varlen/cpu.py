"""Blocked causal attention over batches of documents and its backward, in plain torch.

Documents of nearly equal length are computed together as one batch of matrix products, padded behind their last token:
causality already hides what comes after. Queries are cut into blocks of ``BLOCK``; a block sees the keys from the start
of its window to its own last token, so that most of the upper half of the score matrix is not computed. Heads that
share a key head are stacked along the query axis.

In 16 bits lengths are rounded up to a multiple of ``STEP``: there a CPU's matrix library prepares a kernel for every
new shape, and lengths as they come are nearly all new.

With S = scale Q K^T, P = softmax(S) and O = P V, the backward is

    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(P * dP))      dQ = scale dS K      dK = scale dS^T Q

(Dao et al. 2022, arXiv:2205.14135, appendix B.2). P is computed again from Q and K: one fused softmax is cheaper than
keeping log-sum-exps and going over the scores three times. With a softcap c, S is c tanh(S / c), and dS gets the factor
1 - (S / c)^2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tunesmith.ops.rows import wide_dtype

__all__ = ["BLOCK", "STEP", "backward", "forward"]

STEP = 32
"""Lengths are rounded up to a multiple of this in 16 bits."""
BLOCK = 128
"""Queries of one block."""
# Scores of one product, in elements: 16 MB in float32, so that a batch of documents stays near the cache.
_MOST_SCORES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class _Group:
    """Documents computed together: their tokens, and the slots of those tokens in a (documents, length) grid.

    ``start`` is the first token where the grid is filled without gaps, so that views replace copies.
    """

    documents: int
    length: int
    start: int | None
    tokens: torch.Tensor
    slots: torch.Tensor

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Return (documents, length, H, E) of ``x`` (T, H, E), zero where a document has ended."""
        if self.start is not None:
            return x[self.start : self.start + self.documents * self.length].unflatten(0, (self.documents, self.length))
        grid = x.new_zeros(self.documents * self.length, *x.shape[1:])
        grid[self.slots] = x[self.tokens]
        return grid.view(self.documents, self.length, *x.shape[1:])

    def collect(self, grid: torch.Tensor, out: torch.Tensor) -> None:
        """Write ``grid`` (documents, length, H, E), strided as it may be, to its rows of ``out`` (T, H, E)."""
        if self.start is not None:
            self.spread(out).copy_(grid)
        else:
            out[self.tokens] = grid.reshape(self.documents * self.length, *out.shape[1:])[self.slots].to(out.dtype)


@functools.lru_cache(maxsize=8)
def _groups(lengths: tuple[int, ...], heads: int, step: int, device: torch.device) -> tuple[_Group, ...]:
    """Return documents of one rounded length together, as many as ``_MOST_SCORES`` allows."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in lengths:
        if length:
            by_length.setdefault(-(-length // step) * step, []).append((start, length))
        start += length
    groups: list[_Group] = []
    for rounded, members in sorted(by_length.items()):
        most = max(1, _MOST_SCORES // (heads * min(rounded, BLOCK) * rounded))
        for first in range(0, len(members), most):
            chosen = members[first : first + most]
            tokens = torch.cat([torch.arange(begin, begin + length) for begin, length in chosen])
            slots = torch.cat([torch.arange(length) + row * rounded for row, (_, length) in enumerate(chosen)])
            is_full = len(slots) == len(chosen) * rounded and int(tokens[-1] - tokens[0]) == len(tokens) - 1
            begin = chosen[0][0] if is_full else None
            groups.append(_Group(len(chosen), rounded, begin, tokens.to(device), slots.to(device)))
    return tuple(groups)


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield (first key, first query, end) of every query block; keys and queries both stop before ``end``."""
    for first in range(0, length, BLOCK):
        yield (0 if window is None else max(0, first - window + 1)), first, min(first + BLOCK, length)


@functools.lru_cache(maxsize=64)
def _hidden(rows: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return (rows, keys) bool, True where a query may not look; the last query is at the last key."""
    behind = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)[None, :]
    return (behind < 0 if window is None else (behind < 0) | (behind >= window)).to(device)


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
    wide: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return P (documents, K, G * rows, keys) in ``wide`` and, with a softcap, the slope of the cap."""
    scores = (queries.flatten(2, 3) @ keys.transpose(2, 3)).to(wide)
    if scale != 1.0:
        scores = scores.mul_(scale)
    slope = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        slope = 1 - scores * scores
        scores = scores.mul_(softcap)
    rows, count = queries.shape[3], keys.shape[2]
    # Without a window only the square below the last ``rows`` keys holds something to hide.
    seen = 0 if window is not None else count - rows
    grid = scores.unflatten(2, (-1, rows))[..., seen:]
    grid.masked_fill_(_hidden(rows, count - seen, window, keys.device), float("-inf"))
    return torch.softmax(scores, -1), slope


def _stacked(group: _Group, x: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Return (documents, K, H / K, length, E) contiguous of ``x`` (T, H, E)."""
    grid = group.spread(x).unflatten(2, (key_heads, -1))
    return grid.permute(0, 2, 3, 1, 4).contiguous()


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
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
    wide, (before, behind) = wide_dtype(query.dtype), _split_scale(scale, query.dtype)
    out = query.new_empty(len(query), heads, value.shape[2]) if out is None else out
    for group in _groups(lengths, heads, 1 if query.dtype.itemsize > 2 else STEP, query.device):
        q = _stacked(group, query, key_heads).mul(before)
        k, v = (group.spread(x).transpose(1, 2).contiguous() for x in (key, value))
        found = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        for first_key, first, end in _blocks(group.length, window):
            weights, _ = _weights(q[:, :, :, first:end], k[:, :, first_key:end], behind, window, softcap, wide)
            block = weights.to(q.dtype) @ v[:, :, first_key:end]
            found[:, :, :, first:end] = block.unflatten(2, (-1, end - first))
        group.collect(found.permute(0, 3, 1, 2, 4).flatten(2, 3), out)
    return out, ()


def backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    kept: tuple[torch.Tensor, ...],
    lengths: tuple[int, ...],
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
    wide, (before, behind) = wide_dtype(query.dtype), _split_scale(scale, query.dtype)
    for group in _groups(lengths, heads, 1 if query.dtype.itemsize > 2 else STEP, query.device):
        q, d_found = _stacked(group, query, key_heads).mul(before), _stacked(group, dout, key_heads)
        k, v = (group.spread(x).transpose(1, 2).contiguous() for x in (key, value))
        dq = torch.empty_like(q)
        # Keys and values gather over query blocks: in float32, or late blocks would be rounded away.
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        for first_key, first, end in _blocks(group.length, window):
            keys, queries = k[:, :, first_key:end], q[:, :, :, first:end]
            d_block = d_found[:, :, :, first:end].flatten(2, 3)
            weights, slope = _weights(queries, keys, behind, window, softcap, wide)
            dv[:, :, first_key:end] += weights.to(v.dtype).transpose(2, 3) @ d_block
            d_weights = (d_block @ v[:, :, first_key:end].transpose(2, 3)).to(wide)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, wide)
            if slope is not None:
                d_scores = d_scores.mul_(slope)
            if behind != 1.0:
                d_scores = d_scores.mul_(behind)
            d_scores = d_scores.to(q.dtype)
            dq[:, :, :, first:end] = (d_scores @ keys).unflatten(2, (-1, end - first))
            dk[:, :, first_key:end] += d_scores.transpose(2, 3) @ queries.flatten(2, 3)
        group.collect(dq.mul_(before).permute(0, 3, 1, 2, 4).flatten(2, 3), dquery)
        group.collect(dk.transpose(1, 2), dkey)
        group.collect(dv.transpose(1, 2), dvalue)
