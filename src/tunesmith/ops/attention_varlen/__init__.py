"""Causal attention over documents that lie end to end on one token axis and never see each other.

``reference.py`` is the definition; ``function.py`` the autograd function; ``cpu.py`` its primitives: matrix products
per document and query block, the backward written by hand, nothing of size T x T kept. ``cuda.py`` calls torch's own
variable-length flash attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.attention_varlen import reference
from tunesmith.ops.attention_varlen.function import DocumentAttention

__all__ = ["attention_varlen", "reference"]


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
    """Return causal attention of every token to the tokens before it in its own document.

    Equals :func:`reference.attention_varlen`; keeps only its inputs and output, and never
    forms a score matrix larger than one query block of one document.

    Args:
        query: (H, T, E); any floating dtype; may be strided.
        key, value: (K, T, E) and (K, T, E'), H a multiple of K (grouped queries).
        lengths: tokens of each document in order; they sum to T.
        scale: multiplies ``query @ key.T``.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        sinks: (H,) logits of a virtual key that takes weight and gives nothing (gpt-oss).
    Returns:
        (T, H, E') in the dtype of ``query``; under autocast in autocast's dtype, as torch's own attention computes.
    Raises:
        ShapeError: the lengths do not sum to T, or the heads do not group.
    """
    heads, tokens, _ = query.shape
    if sum(lengths) != tokens:
        raise ShapeError(f"document lengths sum to {sum(lengths)}, the token axis has {tokens}: {tuple(query.shape)}")
    if heads % key.shape[0] or key.shape[:2] != value.shape[:2] or key.shape[1] != tokens:
        raise ShapeError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit"
        )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if sinks is not None:
        return reference.attention_varlen(
            query, key, value, lengths, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    return DocumentAttention.apply(query, key, value, tuple(lengths), scale, window, softcap)  # type: ignore[no-any-return]
