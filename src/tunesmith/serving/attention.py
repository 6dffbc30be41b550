"""Attention of one step: sequences of any lengths side by side on one token axis, over the keys and values they have.

A step holds first one token of every sequence that is being answered, then pieces of prompts. transformers' models call
:func:`attend` in place of their own attention (its ``AttentionInterface``), everything else in them is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.core.errors import ModelError
from tunesmith.serving.cache import SlotCache

__all__ = ["NAME", "Piece", "Step", "attend", "register"]

NAME = "tunesmith_serving"
"""The name of this attention in transformers' table."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one prompt: ``count`` of them in slot ``slot``, after ``offset`` that are cached."""

    slot: int
    offset: int
    count: int


@dataclass(slots=True)
class Step:
    """What the tokens of one forward pass are: one for each of the slots 0 to n-1, then those of the pieces.

    Attributes:
        lengths: tokens that each of the n sequences has before this step.
        pieces: parts of prompts.
        windows: those of the layers that have been computed; None is a layer that sees all.
    """

    cache: SlotCache
    lengths: list[int]
    pieces: list[Piece]
    slots: torch.Tensor = field(init=False)
    positions: torch.Tensor = field(init=False)
    windows: set[int | None] = field(init=False, default_factory=set)
    _masks: dict[int | None, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        slots = [*range(len(self.lengths)), *(piece.slot for piece in self.pieces for _ in range(piece.count))]
        positions = list(self.lengths)
        for piece in self.pieces:
            positions.extend(range(piece.offset, piece.offset + piece.count))
        device = self.cache.keys[0].device
        self.slots = torch.tensor(slots, device=device)
        self.positions = torch.tensor(positions, device=device)

    @property
    def last_tokens(self) -> list[int]:
        """Where the last token of each sequence and of each piece stands on the token axis."""
        ends, end = list(range(len(self.lengths))), len(self.lengths)
        for piece in self.pieces:
            end += piece.count
            ends.append(end - 1)
        return ends

    @property
    def longest(self) -> int:
        """Tokens of the longest of the n sequences with its new token."""
        return max(self.lengths) + 1

    def hidden(self, window: int | None) -> torch.Tensor:
        """Return (n, 1, 1, longest), true where a sequence has no token or one that its window does not reach."""
        if window not in self._masks:
            last = self.positions[: len(self.lengths), None]
            place = torch.arange(self.longest, device=last.device)
            is_hidden = place > last
            if window is not None:
                is_hidden |= place <= last - window
            self._masks[window] = is_hidden[:, None, None, :]
        return self._masks[window]


def register() -> None:
    """Enter :func:`attend` into transformers' table of attention functions, where models look it up by name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    serving: Step,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Cache the new keys and values and return the attention of every token, (1, T, H, d).

    Args:
        query: (1, H, T, d), rotated already, as ``key`` and ``value`` (1, Hkv, T, d).
        s_aux: one score a head that takes part in the softmax and has no value (attention sinks).
        others: ``sliding_window``, tokens that a token sees, itself included. Models that do not pass it (qwen2_moe)
            keep it in the module; that of a module whose model passes None (exaone4) is not in use.
    """
    if position_bias is not None:
        raise ModelError("models that add a bias to attention scores by distance are not served. Use generate.")
    _, heads, tokens, width = query.shape
    window = others.get("sliding_window", getattr(module, "sliding_window", None))
    serving.windows.add(window)
    scale = width**-0.5 if scaling is None else scaling
    layer = module.layer_idx
    keys, values = serving.cache.keys[layer], serving.cache.values[layer]
    keys[serving.slots, :, serving.positions] = key[0].transpose(0, 1)
    values[serving.slots, :, serving.positions] = value[0].transpose(0, 1)
    out = query.new_empty(tokens, heads, width)
    n = len(serving.lengths)
    if n:
        length = serving.longest
        # Query heads that share a key-value head form one matrix: nothing is repeated.
        rows = query[0, :, :n].transpose(0, 1).reshape(n, keys.shape[1], -1, width)
        hidden = serving.hidden(window)
        mixed = _mix(rows, keys[:n, :, :length], values[:n, :, :length], hidden, scale, softcap, s_aux)
        out[:n] = mixed.reshape(n, heads, width)
    start = n
    for piece in serving.pieces:
        end = start + piece.count
        length = piece.offset + piece.count
        past = keys[piece.slot, :, :length], values[piece.slot, :, :length]
        out[start:end] = _prompt(query[0, :, start:end], *past, piece.offset, scale, softcap, window, s_aux)
        start = end
    return out[None], None


def _prompt(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offset: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return (T, H, d) for the tokens of one piece; query (H, T, d), keys (Hkv, offset + T, d)."""
    heads, count, width = query.shape
    length, groups = keys.shape[1], keys.shape[0]
    is_whole = offset == 0 and (window is None or length <= window)
    hidden = None
    if not is_whole:
        place = torch.arange(length, device=query.device)
        at = torch.arange(offset, length, device=query.device)[:, None]
        hidden = place > at
        if window is not None:
            hidden |= place <= at - window
    if softcap is None and sinks is None:
        mixed = scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=None if hidden is None else ~hidden,
            is_causal=hidden is None,
            scale=scale,
            enable_gqa=groups != heads,
        )
        return mixed[0].transpose(0, 1)
    if hidden is None:
        hidden = torch.ones(count, length, dtype=torch.bool, device=query.device).triu(1)
    rows = query.reshape(1, groups, -1, width)
    mixed = _mix(rows, keys[None], values[None], hidden.repeat(heads // groups, 1), scale, softcap, sinks)
    return mixed.reshape(heads, count, width).transpose(0, 1)


def _mix(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return the values mixed by their scores: query (B, Hkv, G, d), keys and values (B, Hkv, L, d)."""
    scores = torch.matmul(query, keys.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        own = (
            sinks.float()
            .reshape(1, keys.shape[1], -1)
            .repeat_interleave(scores.shape[2] * keys.shape[1] // sinks.numel(), 2)
        )
        scores = torch.cat([scores, own[..., None].expand(*scores.shape[:3], 1)], dim=-1)
        return torch.matmul(scores.softmax(-1)[..., :-1].to(values.dtype), values)
    return torch.matmul(scores.softmax(-1).to(values.dtype), values)
