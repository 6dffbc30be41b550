"""Blocked causal attention over batches of documents, with a hand-written backward.

Documents of nearly equal length (up to a multiple of ``STEP``) are computed together as one batch of matrix products,
padded behind their last token: causality already hides what comes after. Longer documents are cut into blocks of
``BLOCK`` queries; a block sees the keys from the start of its window to its own last token, so that the upper half of
the score matrix is not computed. Heads that share a key head are stacked along the query axis.

Rounding lengths up is worth more than it costs: a CPU's matrix library prepares a kernel for every new shape, and
lengths as they come are nearly all new.

With S = scale Q K^T, P = softmax(S) and O = P V, the backward is

    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(dO * O))      dQ = scale dS K      dK = scale dS^T Q

(Dao et al. 2022, arXiv:2205.14135, appendix B.2). P is recomputed from Q, K and the saved log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["BLOCK", "STEP", "BlockedAttention"]

STEP = 32
"""Lengths are rounded up to a multiple of this."""
BLOCK = 256
"""Queries of one block."""
# Scores of one product, in elements: 16 MB in float32, so that a batch of documents stays near the cache.
_MOST_SCORES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class _Group:
    """Documents computed together: their tokens, and the slots of those tokens in a (documents, length) grid."""

    documents: int
    length: int
    tokens: torch.Tensor
    slots: torch.Tensor

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Return (documents, H, length, E) of ``x`` (T, H, E), zero where a document has ended."""
        grid = x.new_zeros(self.documents * self.length, *x.shape[1:])
        grid[self.slots] = x[self.tokens]
        return grid.view(self.documents, self.length, *x.shape[1:]).transpose(1, 2)

    def collect(self, grid: torch.Tensor, out: torch.Tensor) -> None:
        """Write ``grid`` (documents, H, length, E) to the rows of ``out`` (T, H, E) that it came from."""
        flat = grid.transpose(1, 2).reshape(self.documents * self.length, *out.shape[1:])
        out[self.tokens] = flat[self.slots]


def _groups(lengths: tuple[int, ...], heads: int, device: torch.device) -> Iterator[_Group]:
    """Yield documents of one rounded length together, as many as ``_MOST_SCORES`` allows."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in lengths:
        if length:
            by_length.setdefault(-(-length // STEP) * STEP, []).append((start, length))
        start += length
    for rounded, members in sorted(by_length.items()):
        most = max(1, _MOST_SCORES // (heads * min(rounded, BLOCK) * rounded))
        for first in range(0, len(members), most):
            chosen = members[first : first + most]
            tokens = torch.cat([torch.arange(begin, begin + length) for begin, length in chosen])
            slots = torch.cat([torch.arange(length) + row * rounded for row, (_, length) in enumerate(chosen)])
            yield _Group(len(chosen), rounded, tokens.to(device), slots.to(device))


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield (first key, first query, end) of every query block; keys and queries both stop before ``end``."""
    for first in range(0, length, BLOCK):
        yield (0 if window is None else max(0, first - window + 1)), first, min(first + BLOCK, length)


def _scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, distance: int, window: int | None, wide: torch.dtype
) -> torch.Tensor:
    """Return masked scores (D, K, G, queries, keys) in ``wide``; ``distance`` is from first key to first query."""
    documents, key_heads, group, rows, size = queries.shape
    product = queries.reshape(documents, key_heads, group * rows, size) @ keys.transpose(2, 3)
    scores = (product.to(wide) if product.dtype != wide else product).mul_(scale)
    scores = scores.view(documents, key_heads, group, rows, -1)
    position = torch.arange(rows, device=keys.device)[:, None] + distance
    behind = position - torch.arange(keys.shape[2], device=keys.device)[None, :]
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    return scores.masked_fill_(hidden, float("-inf"))


class BlockedAttention(torch.autograd.Function):
    """``apply(query (H,T,E), key (K,T,E), value (K,T,E'), lengths, scale, window) -> (T,H,E')``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Save q, k, v, the output and (T, H, 1) log-sum-exps in float32 (float64 for float64)."""
        heads, tokens, _ = query.shape
        key_heads = key.shape[0]
        wide = torch.promote_types(query.dtype, torch.float32)
        output = query.new_empty(tokens, heads, value.shape[-1])
        log_sums = torch.empty(tokens, heads, 1, dtype=wide, device=query.device)
        for group in _groups(lengths, heads, query.device):
            q, k, v = (group.spread(x.transpose(0, 1)) for x in (query, key, value))
            q = q.view(group.documents, key_heads, heads // key_heads, group.length, -1)
            out = q.new_empty(group.documents, heads, group.length, v.shape[-1])
            sums = out.new_empty(group.documents, heads, group.length, 1, dtype=wide)
            for first_key, first, end in _blocks(group.length, window):
                keys, values = k[:, :, first_key:end], v[:, :, first_key:end]
                scores = _scores(q[:, :, :, first:end], keys, scale, first - first_key, window, wide)
                log_sum = scores.logsumexp(-1, keepdim=True)
                weights = scores.sub_(log_sum).exp_().to(q.dtype).flatten(2, 3)
                out[:, :, first:end] = (weights @ values).view(group.documents, heads, end - first, -1)
                sums[:, :, first:end] = log_sum.view(group.documents, heads, end - first, 1)
            group.collect(out, output)
            group.collect(sums, log_sums)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.lengths, ctx.scale, ctx.window = lengths, scale, window
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of query, key and value."""
        query, key, value, output, log_sums = ctx.saved_tensors
        scale, window, wide = ctx.scale, ctx.window, log_sums.dtype
        heads, key_heads = query.shape[0], key.shape[0]
        row_sums = (grads[0].to(wide) * output).sum(-1, keepdim=True)
        results = [x.new_empty(x.shape[1], x.shape[0], x.shape[2]) for x in (query, key, value)]
        for group in _groups(ctx.lengths, heads, query.device):
            shape = (group.documents, key_heads, heads // key_heads, group.length, -1)
            k, v = (group.spread(x.transpose(0, 1)) for x in (key, value))
            q, d_out, sums, deltas = (
                group.spread(x).view(shape) for x in (query.transpose(0, 1), grads[0], log_sums, row_sums)
            )
            dq = torch.empty_like(q)
            # Keys and values gather over query blocks: in float32, or late blocks would be rounded away.
            dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
            for first_key, first, end in _blocks(group.length, window):
                keys, values = k[:, :, first_key:end], v[:, :, first_key:end]
                weights = _scores(q[:, :, :, first:end], keys, scale, first - first_key, window, wide)
                weights = weights.sub_(sums[:, :, :, first:end]).exp_()
                d_block = d_out[:, :, :, first:end].flatten(2, 3)
                dv[:, :, first_key:end] += weights.to(v.dtype).flatten(2, 3).transpose(2, 3) @ d_block
                d_scores = (d_block @ values.transpose(2, 3)).view(weights.shape)
                d_scores = (d_scores - deltas[:, :, :, first:end]).mul_(weights).mul_(scale)
                d_scores = d_scores.to(q.dtype).flatten(2, 3)
                dq[:, :, :, first:end] = (d_scores @ keys).view(*shape[:3], end - first, -1)
                dk[:, :, first_key:end] += d_scores.transpose(2, 3) @ q[:, :, :, first:end].flatten(2, 3)
            for grid, out in zip((dq.flatten(1, 2), dk.to(k.dtype), dv.to(v.dtype)), results, strict=True):
                group.collect(grid, out)
        dq, dk, dv = (result.transpose(0, 1) for result in results)
        return dq, dk, dv, None, None, None
