"""Which models the engine takes, and what it needs to know of one: its window, its keys and values, the free memory."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.core.errors import ModelError
from tunesmith.models.load import facts_of
from tunesmith.models.vision import has_vision
from tunesmith.serving.cache import SlotCache

__all__ = ["cache_for", "not_served", "refuse_kind", "slides", "spare_bytes", "window_of"]


def refuse_kind(model: Any) -> None:
    """Raise for models whose layers do not look their attention up, or need more than tokens."""
    if hasattr(model, "peft_config"):
        raise ModelError("the engine serves a base with adapters beside it: load the base and add the adapter.")
    if has_vision(model.config):
        raise not_served(model, "models that see images are not served yet")
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():
        raise not_served(model, "its layers do not use transformers' table of attention functions")


def not_served(model: Any, why: str) -> ModelError:
    """Return the error for a model that the engine does not take."""
    return ModelError(f"{type(model).__name__} cannot be served: {why}. Use generate_answers or another server.")


def window_of(model: Any) -> int:
    """Return the tokens that a sequence may have."""
    window = facts_of(model).window
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # These turn positions by other angles once the longest sequence of a step is long: of all in it.
        own = rope.get("original_max_position_embeddings") or model.config.get_text_config().max_position_embeddings
        return min(window, own)
    return window


def slides(model: Any, window: int) -> bool:
    """Say whether layers of ``model`` see fewer than ``window`` tokens back, by its config."""
    config = model.config.get_text_config()
    own, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return own is not None and own < window and (kinds is None or "sliding_attention" in kinds)


def cache_for(model: Any, device: torch.device) -> SlotCache:
    """Return an empty cache for the keys and values of ``model``."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return SlotCache(config.num_hidden_layers, heads, width, dtype=facts_of(model).dtype.dtype, device=device)


def spare_bytes(device: torch.device) -> int:
    """Return what keys and values may take: half of the free memory, of a GPU four fifths."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    import psutil

    return psutil.virtual_memory().available // 2
