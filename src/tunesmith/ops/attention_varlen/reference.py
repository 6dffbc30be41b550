"""Attention per document in plain torch, one document at a time: the definition that fast paths are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["attention_varlen"]


def attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (T, H, E'); the arguments are those of :func:`tunesmith.ops.attention_varlen.attention_varlen`."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    outputs: list[torch.Tensor] = []
    start = 0
    for length in lengths:
        q, k, v = (tensor[:, start : start + length] for tensor in (query, key, value))
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(length, device=query.device)
        distance = position[:, None] - position[None, :]
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, length, 1).to(scores.dtype)], dim=-1)
        # Half precision sums in float32, float64 stays float64.
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        outputs.append((weights[..., :length] @ v).transpose(0, 1))
        start += length
    return torch.cat(outputs) if outputs else query.new_empty(0, query.shape[0], value.shape[-1])
