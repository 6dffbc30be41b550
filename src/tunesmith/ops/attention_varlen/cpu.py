"""Blocked causal attention over batches of documents and its backward, in plain torch.

Documents of nearly equal length are computed together as one batch of matrix products, padded behind their last token:
causality already hides what comes after. Queries are cut into blocks; a block sees the keys from the start of its
window to its own last token, so that most of the upper half of the score matrix is not computed. Every head is a
product of its own, those that share a key head on copies of it: that shares out evenly among few threads.

In 16 bits products are cheap beside the calls that make them, and a CPU's matrix library prepares a kernel for every
new shape. So there lengths are rounded up to two sizes an octave, blocks are larger, and the softmax runs in torch's
own kernels, which widen within the registers.

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

from tunesmith.ops.attention_varlen.documents import Lengths, host_lengths
from tunesmith.ops.rows import wide_dtype

__all__ = ["BLOCK", "STEP", "backward", "forward"]

STEP = 32
"""Lengths are rounded up to a multiple of this, and longer ones of more, in 16 bits."""
BLOCK, _BLOCK_16 = 64, 128
"""Queries of one block, in 32 and more bits and in 16."""
# Scores of one product, in elements: 16 MB in float32, so that a batch of documents stays near the cache.
_MOST_SCORES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class _Group:
    """Documents computed together, each in a row of a grid (documents, length).

    ``members`` are their first tokens and lengths. ``start`` is the first token of all where they fill the grid without
    gaps, so that views replace copies.
    """

    members: tuple[tuple[int, int], ...]
    length: int
    start: int | None

    @property
    def documents(self) -> int:
        return len(self.members)

    def heads(self, x: torch.Tensor, copies: int = 1) -> torch.Tensor:
        """Return (documents * H * copies, length, E) of ``x`` (T, H, E), each head ``copies`` times, padded with 0."""
        out = x.new_empty(self.documents, x.shape[1], copies, self.length, x.shape[2])
        if self.start is not None:
            out.copy_(self._view(x).transpose(1, 2).unsqueeze(2))
            return out.flatten(0, 2)
        for row, (begin, length) in zip(out, self.members, strict=True):
            row[:, :, :length].copy_(x[begin : begin + length].transpose(0, 1).unsqueeze(1))
            row[:, :, length:].zero_()
        return out.flatten(0, 2)

    def grid(self, out: torch.Tensor) -> torch.Tensor:
        """Return (documents, length, H, E) to fill for ``out`` (T, H, E): a view where one is."""
        if self.start is not None:
            return self._view(out)
        return out.new_empty(self.documents, self.length, *out.shape[1:])

    def write(self, grid: torch.Tensor, out: torch.Tensor) -> None:
        """Write ``grid``, made by :meth:`grid` and filled since, to ``out``."""
        if self.start is None:
            for row, (begin, length) in zip(grid, self.members, strict=True):
                out[begin : begin + length].copy_(row[:length])

    def _view(self, x: torch.Tensor) -> torch.Tensor:
        assert self.start is not None
        return x[self.start : self.start + self.documents * self.length].unflatten(0, (self.documents, self.length))


@functools.lru_cache(maxsize=8)
def _groups(lengths: tuple[int, ...], heads: int, is_narrow: bool) -> tuple[_Group, ...]:
    """Return documents of one rounded length together, as many as ``_MOST_SCORES`` allows."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in lengths:
        if length:
            by_length.setdefault(_rounded(length) if is_narrow else length, []).append((start, length))
        start += length
    groups: list[_Group] = []
    for rounded, members in sorted(by_length.items()):
        most = max(1, _MOST_SCORES // (heads * min(rounded, _block(is_narrow)) * rounded))
        for first in range(0, len(members), most):
            chosen = tuple(members[first : first + most])
            begin, (last, _) = chosen[0][0], chosen[-1]
            is_full = all(length == rounded for _, length in chosen) and last - begin == (len(chosen) - 1) * rounded
            groups.append(_Group(chosen, rounded, begin if is_full else None))
    return tuple(groups)


def _rounded(length: int) -> int:
    """Return ``length`` rounded up to a multiple of a quarter of the next power of two, at least of ``STEP``."""
    step = max(STEP, 1 << (length - 1).bit_length() - 2) if length > STEP else STEP
    return -(-length // step) * step


def _block(is_narrow: bool) -> int:
    return _BLOCK_16 if is_narrow else BLOCK


def _blocks(length: int, window: int | None, block: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first key, first query, end) of every query block; keys and queries both stop before ``end``."""
    for first in range(0, length, block):
        yield (0 if window is None else max(0, first - window + 1)), first, min(first + block, length)


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return P (heads, rows, keys) and, with a softcap, the slope of the cap; in 16 bits only where S needs no more."""
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
    rows, count = queries.shape[1], keys.shape[1]
    # Without a window only the square below the last ``rows`` keys holds something to hide.
    seen = 0 if window is not None else count - rows
    scores[..., seen:].add_(_hidden(rows, count - seen, window, scores.dtype, keys.device))
    return torch.softmax(scores, -1), slope


def _product(a: torch.Tensor, b: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Return a b in the front of ``buffer``."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return torch.bmm(a, b, out=buffer[: math.prod(shape)].view(shape))


def _added(total: torch.Tensor | None, part: torch.Tensor, first: int, length: int) -> torch.Tensor:
    """Return ``total`` (heads, length, E), None for zeros, with ``part`` added from ``first`` on, in float32 at least.

    In 16 bits late blocks would be rounded away.
    """
    wide = wide_dtype(part.dtype)
    if total is None:
        if part.shape[1] == length:
            return part.to(wide)
        total = part.new_zeros(part.shape[0], length, part.shape[2], dtype=wide)
    total[:, first : first + part.shape[1]] += part
    return total


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
    heads, copies = query.shape[1], query.shape[1] // key.shape[1]
    before, behind = _split_scale(scale, query.dtype)
    out = query.new_empty(len(query), heads, value.shape[2]) if out is None else out
    is_narrow = query.dtype.itemsize == 2
    for group in _groups(host_lengths(lengths), heads, is_narrow):
        q, k, v = group.heads(query), group.heads(key, copies), group.heads(value, copies)
        q = q.mul_(before) if before != 1.0 else q
        buffer = q.new_empty(len(q) * min(_block(is_narrow), group.length) * group.length)
        found = group.grid(out)
        for first_key, first, end in _blocks(group.length, window, _block(is_narrow)):
            weights, _ = _weights(q[:, first:end], k[:, first_key:end], behind, window, softcap, buffer)
            block = torch.bmm(weights.to(q.dtype), v[:, first_key:end])
            found[:, first:end] = block.unflatten(0, (group.documents, heads)).transpose(1, 2)
        group.write(found, out)
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
    heads, copies = query.shape[1], query.shape[1] // key.shape[1]
    (before, behind), is_narrow = _split_scale(scale, query.dtype), query.dtype.itemsize == 2
    for group in _groups(host_lengths(lengths), heads, is_narrow):
        q, d_found = group.heads(query), group.heads(dout)
        k, v = group.heads(key, copies), group.heads(value, copies)
        q = q.mul_(before) if before != 1.0 else q
        size = len(q) * min(_block(is_narrow), group.length) * group.length
        for_scores, for_slopes = q.new_empty(size), q.new_empty(size)
        found = group.grid(dquery)
        dk: torch.Tensor | None = None
        dv: torch.Tensor | None = None
        # The last block first: without a window it sees all keys.
        for first_key, first, end in reversed(list(_blocks(group.length, window, _block(is_narrow)))):
            keys, queries, d_block = k[:, first_key:end], q[:, first:end], d_found[:, first:end]
            weights, slope = _weights(queries, keys, behind, window, softcap, for_scores)
            dv = _added(dv, torch.bmm(weights.to(v.dtype).transpose(1, 2), d_block), first_key, group.length)
            d_weights = _product(d_block, v[:, first_key:end].transpose(1, 2), for_slopes).to(weights.dtype)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if slope is not None:
                d_scores = d_scores.mul_(slope)
            if behind != 1.0:
                d_scores = d_scores.mul_(behind)
            d_scores = d_scores.to(q.dtype)
            d_queries = torch.bmm(d_scores, keys).unflatten(0, (group.documents, heads)).transpose(1, 2)
            torch.mul(d_queries, before, out=found[:, first:end])
            dk = _added(dk, torch.bmm(d_scores.transpose(1, 2), queries), first_key, group.length)
        group.write(found, dquery)
        for grad, target in ((dk, dkey), (dv, dvalue)):
            assert grad is not None
            found = group.grid(target)
            shared = grad.view(group.documents, -1, copies, *grad.shape[1:])
            found.copy_((shared.sum(2) if copies > 1 else shared[:, :, 0]).transpose(1, 2))
            group.write(found, target)
