"""Our attention under transformers' own registry, so that documents joined on one token axis never see each other.

``use_document_attention(model)`` selects it on one model instance. It cuts the token axis where ``cu_seq_lens_q`` says
so, or where position ids restart; a padded batch is documents too, with the padding as documents of their own. With
any other mask or a key-value cache (generation) it hands over to transformers' own SDPA. Nothing of transformers is
replaced: the registry entry is ours alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.core.errors import ModelError
from tunesmith.ops.attention_varlen import attention_varlen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ATTENTION", "document_lengths", "use_document_attention"]

ATTENTION = "tunesmith"
_LAYER_KINDS = {"full_attention", "sliding_attention"}


def use_document_attention(model: PreTrainedModel) -> str | None:
    """Select document attention on ``model``; return None, or the reason why its own attention stays.

    Attention that was asked for by name (eager, flash_attention_2 ...) is left alone; only the default is replaced.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    config = model.config.get_text_config()
    if not getattr(type(model), "_supports_attention_backend", False):
        return f"{type(model).__name__} does not call transformers' attention interface"
    if not getattr(config, "is_causal", True):
        return f"{type(model).__name__} attends in both directions (is_causal=False)"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= _LAYER_KINDS:
        return f"{type(model).__name__} mixes in layers of kind {', '.join(sorted(kinds - _LAYER_KINDS))}"
    if model.config._attn_implementation not in ("sdpa", ATTENTION) and not _needs_eager(model):
        return f"attn_implementation={model.config._attn_implementation!r} was chosen"
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, _mask)
    model.set_attn_implementation(ATTENTION)
    return None


def _needs_eager(model: PreTrainedModel) -> bool:
    """Return whether transformers falls back to eager for features that our attention computes itself."""
    config = model.config.get_text_config()
    # gpt-oss has no SDPA path because of its sinks.
    return getattr(config, "attn_logit_softcapping", None) is not None or not getattr(model, "_supports_sdpa", False)


def _mask(*, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """Build no mask where the token axis itself says everything, else the one transformers' SDPA would get.

    Padding beside whole sequences becomes a one-dimensional int32 tensor: the lengths of all documents of the batch. A
    mask that is given with one dimension says that the documents are known otherwise (``cu_seq_lens_q``).
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if kwargs.get("mask_function") is bidirectional_mask_function:
        raise ModelError(
            "this model was made to attend in both directions (is_causal=False) after it was loaded. Write it into its "
            "config.json before, or load it with attn_implementation='sdpa'."
        )
    is_plain = q_length == kv_length and not kwargs.get("use_vmap", False)
    if is_plain and (attention_mask is None or attention_mask.ndim == 1):
        return None
    if is_plain and attention_mask is not None and attention_mask.shape[-1] == kv_length:
        lengths = _padded_lengths(attention_mask)
        if lengths is not None:
            return torch.tensor(lengths, dtype=torch.int32)
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


def _padded_lengths(mask: torch.Tensor) -> list[int] | None:
    """Return the lengths of padding, tokens and padding in each row of ``mask`` (B, T), None where tokens lie apart."""
    found: list[int] = []
    for row in mask.bool().tolist():
        count = sum(row)
        first = row.index(True) if count else 0
        if not all(row[first : first + count]):
            return None
        found += [length for length in (first, count, len(row) - first - count) if length]
    return found


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention interface of transformers: (B,H,T,E) in, (B,T,H,E) out."""
    if kwargs.get("output_attentions"):
        raise ModelError(
            "output_attentions=True: this attention never has its weights in memory. Load the model with "
            "attn_implementation='eager'."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (attention_mask is not None and attention_mask.ndim != 1) or query.shape[2] != key.shape[2]:
        return _masked(module, query, key, value, attention_mask, dropout, scale, softcap, s_aux, kwargs), None
    found = document_lengths(query.shape[0], query.shape[2], attention_mask, kwargs)
    if dropout > 0.0:
        # Rare, and slow: the documents' own mask is built, so that dropout meets each weight once.
        mask = torch.stack([_document_mask(lengths, sliding_window, query.device) for lengths in found])
        return _masked(module, query, key, value, mask[:, None], dropout, scale, softcap, s_aux, kwargs), None
    rows = [
        attention_varlen(
            query[row], key[row], value[row], lengths, scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux
        )
        for row, lengths in enumerate(found)
    ]
    return (rows[0][None] if len(rows) == 1 else torch.stack(rows)), None


def document_lengths(batch: int, tokens: int, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> list[list[int]]:
    """Return the document lengths of every row of a (``batch``, ``tokens``) batch.

    ``mask`` is None or what :func:`_mask` made of padding; ``kwargs`` are those that transformers passes to attention.
    """
    if mask is not None:
        rows: list[list[int]] = [[]]
        for length in mask.tolist():
            if sum(rows[-1]) == tokens:
                rows.append([])
            rows[-1].append(length)
        return rows
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None and batch == 1:
        return [(bounds[1:] - bounds[:-1]).tolist()]
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 2:
        return [[tokens]] * batch
    lengths: list[list[int]] = []
    cached = bool(kwargs.get("use_cache"))
    for row in positions.expand(batch, -1).tolist():
        # A row may start anywhere (a window cut from a longer text); a document starts where positions do not go on.
        # Beside a cache transformers looks for no documents: there only positions that begin again are ones.
        is_start = [now <= last if cached else now != last + 1 for last, now in pairwise(row)]
        starts = [0, *(t for t, found in enumerate(is_start, 1) if found), tokens]
        lengths.append([end - start for start, end in pairwise(starts)])
    return lengths


def _document_mask(lengths: list[int], window: int | None, device: torch.device) -> torch.Tensor:
    """Return (T, T) bool, True where a query sees a key of its own document that is not after it or out of window."""
    document = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    position = torch.arange(len(document), device=device)
    behind = position[:, None] - position[None, :]
    visible = (document[:, None] == document[None, :]) & (behind >= 0)
    return visible if window is None else visible & (behind < window)


def _masked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Attention under an explicit mask: SDPA, or plain torch where softcap or sinks are asked for."""
    if softcap is None and sinks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)[0]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    keys = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :keys]
    weights = torch.nn.functional.dropout(weights, dropout, training=module.training)
    # A fully masked row (left padding) is all -inf: its weights are NaN and its output is never read.
    return (weights.nan_to_num() @ value).transpose(1, 2).contiguous()
