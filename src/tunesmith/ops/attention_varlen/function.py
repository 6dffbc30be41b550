"""Attention over documents as one autograd function over the dispatched primitives."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.ops.dispatch import primitives
from tunesmith.ops.once import differentiable_once
from tunesmith.ops.rows import side_by_side

__all__ = ["DocumentAttention"]


class DocumentAttention(torch.autograd.Function):
    """``apply(query (H,T,E), key (K,T,E), value (K,T,E'), lengths, scale, window, softcap) -> (T,H,E')``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Save q, k, v, the output and what the primitives keep."""
        ctx.settings = {"scale": scale, "window": window, "softcap": softcap}
        tokens = [x.transpose(0, 1) for x in (query, key, value)]
        output, kept = primitives("attention_varlen", query).forward(*tokens, lengths, **ctx.settings)
        ctx.save_for_backward(query, key, value, output, *kept)
        ctx.lengths = lengths
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of query, key and value."""
        # Read once: under checkpointing a saved tensor can be unpacked only once.
        *inputs, output = (saved := ctx.saved_tensors)[:4]
        query, key, value = (x.transpose(0, 1) for x in inputs)
        results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        dquery, dkey, dvalue = results
        primitives("attention_varlen", query).backward(
            side_by_side(grads[0]),
            query,
            key,
            value,
            output,
            saved[4:],
            ctx.lengths,
            **ctx.settings,
            dquery=dquery,
            dkey=dkey,
            dvalue=dvalue,
        )
        return *(result.transpose(0, 1) for result in results), None, None, None, None
