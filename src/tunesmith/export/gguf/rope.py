"""Rotary embeddings as llama.cpp is told of them: values, and for llama3 and longrope a tensor of factors.

A scheme that llama.cpp has no words for is refused: it would compute other positions and still answer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tunesmith.core.errors import ExportError

__all__ = ["rope_factors", "rope_values"]

_WITH_FACTORS = {"llama3": ("llama",), "longrope": ("phi3", "llama")}


def _own(config: Any) -> dict[str, Any]:
    """Return the rope parameters of the layers that see everything."""
    whole = config.rope_parameters
    return whole.get("full_attention", whole)


def rope_values(config: Any, arch: str, head: int) -> dict[str, Any]:
    """Return what llama.cpp reads of a rotary embedding, without the prefix of the architecture.

    Raises:
        ExportError: the scheme is none that llama.cpp knows for ``arch``.
    """
    own = _own(config)
    kind = own.get("rope_type", "default")
    values: dict[str, Any] = {
        "rope.freq_base": float(own["rope_theta"]),
        "rope.dimension_count": int(head * own.get("partial_rotary_factor", 1.0)),
    }
    if "sliding_attention" in config.rope_parameters:
        near = config.rope_parameters["sliding_attention"]
        if near.get("rope_type", "default") != "default":
            raise ExportError("layers with a window have a stretched rotary embedding, which llama.cpp does not know.")
        values["rope.freq_base_swa"] = float(near["rope_theta"])
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(own["factor"])}
    elif kind == "yarn":
        values |= _yarn(config, own)
    elif kind == "longrope" and arch in _WITH_FACTORS[kind]:
        values |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": _attention_factor(config, kind)}
        values["rope.scaling.original_context_length"] = int(own["original_max_position_embeddings"])
    elif kind != "default" and arch not in _WITH_FACTORS.get(kind, ()):
        raise ExportError(f"llama.cpp does not know the rotary embedding {kind!r} of this {arch} model.")
    return values


def _yarn(config: Any, own: dict[str, Any]) -> dict[str, Any]:
    if not own.get("truncate", True):
        raise ExportError("llama.cpp rounds the bounds of yarn, and this model was made with truncate: false.")
    factor = float(own["factor"])
    values = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(own["original_max_position_embeddings"]),
        "rope.scaling.yarn_beta_fast": float(own.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(own.get("beta_slow") or 1),
    }
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0  # what llama.cpp multiplies by itself
    ours = _attention_factor(config, "yarn")
    if not math.isclose(ours, usual, rel_tol=1e-6):
        values["rope.scaling.attn_factor"] = ours / usual
    return values


def _layer_type(config: Any) -> str | None:
    return "full_attention" if "full_attention" in config.rope_parameters else None


def _computed(config: Any, kind: str, **how: Any) -> tuple[np.ndarray, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", layer_type=_layer_type(config), **how)
    return frequencies.float().numpy(), float(factor)


def _attention_factor(config: Any, kind: str) -> float:
    return _computed(config, kind)[1]


def rope_factors(config: Any, arch: str) -> dict[str, np.ndarray]:
    """Return tensor name -> what each frequency is divided by, float32; empty for schemes without such a tensor."""
    own = _own(config)
    kind = own.get("rope_type", "default")
    if kind == "llama3" and arch in _WITH_FACTORS[kind]:
        made = _computed(config, kind)[0]
        plain = own["rope_theta"] ** (-np.arange(len(made), dtype=np.float64) / len(made))
        return {"rope_freqs.weight": (plain / made).astype(np.float32)}
    if kind == "longrope":
        factors = {reach: np.asarray(own[f"{reach}_factor"], np.float32) for reach in ("long", "short")}
        return {f"rope_factors_{reach}.weight": value for reach, value in factors.items()}
    return {}
