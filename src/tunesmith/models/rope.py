"""Windows longer than a model was trained for: its rotary embedding stretched as ``rope_scaling`` says.

The scheme is written into the config before the model is made, so that training, generation and a saved model read the
same. ``dynamic`` is the NTK-aware change of the base for the whole window (theta' = theta * factor^(d / (d - 2))):
transformers' own follows the longest position of a batch, by which a document would be computed in another way beside
a longer one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.core.names import did_you_mean

__all__ = ["AUTOMATIC", "SCHEMES", "Stretch", "automatic", "native_window", "stretch"]

SCHEMES = ("linear", "dynamic", "yarn", "llama3")

AUTOMATIC = "yarn"
"""The scheme of a longer window when none is asked for; chosen by ``python -m benchmarks.rope`` (docs/training.md)."""

_LONGEST = 4  # times the model's own window that a scheme is chosen for unasked

# Models whose first position is the one behind the id of the padding token: RoBERTa's table of 514 holds 512.
_BEHIND_PADDING = (
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip

_FULL = "full_attention"
_KEYS = (
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim",
    "truncate",
)  # fmt: skip


@dataclass(frozen=True)
class Stretch:
    """How a window is stretched.

    Attributes:
        scaling: one of :data:`SCHEMES`, or rope parameters of transformers.
        window: positions that it is made for; None with rope parameters: as many as they give.
    """

    scaling: str | dict[str, Any]
    window: int | None


def native_window(config: Any) -> int | None:
    """Return the number of positions a model was trained for, or None where its config names no limit."""
    text = config.get_text_config()
    native = getattr(text, "max_position_embeddings", None)
    if native is None or native < 0:  # XLNet: -1
        return None
    return native - (text.pad_token_id or 0) - 1 if text.model_type in _BEHIND_PADDING else native


def stretch(config: Any, how: Stretch) -> None:
    """Write a stretched rotary embedding into a config of transformers.

    Raises:
        SettingsError: an unknown scheme, a window that needs none, rope parameters that transformers refuses, or a
            model without rotary embedding or with a scheme of its own.
    """
    scaling, window = how.scaling, how.window
    text = config.get_text_config()
    native, whole = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None)
    if not native or not whole:
        raise SettingsError(f"rope_scaling: {type(config).__name__} has no rotary embedding that could be stretched.")
    # Layers with a sliding window never see far: only the others are stretched.
    own = whole.get(_FULL, whole)
    if not isinstance(scaling, (str, dict)):
        raise SettingsError(
            f"rope_scaling={scaling!r}: give one of {', '.join(SCHEMES)}, or a dict of rope parameters."
        )
    if isinstance(scaling, str):
        made = _scheme(scaling, own, native, window, _rotary_size(text, own))
        text.max_position_embeddings = int(window or native)
    else:
        made = _given(scaling, own, native, _rotary_size(text, own))
        trained = made.get("original_max_position_embeddings", native)
        if own.get("rope_type") == made["rope_type"] and "factor" in own:
            # The same scheme, wider: its window grows with its factor.
            trained = _own_reach(own, native) / own["factor"]
        reach = max(native, round(trained * scaling.get("factor", 1.0)))
        if window is not None and window > reach:
            raise SettingsError(
                f"max_seq_length={window} is above the {reach} positions that rope_scaling {scaling} gives a model of "
                f"{native}. Give a larger factor."
            )
        if made["rope_type"] in ("yarn", "llama3"):
            made.setdefault("original_max_position_embeddings", native)
        # What the scheme reaches, whatever is asked for of it: loaded again, the model is stretched no further.
        text.max_position_embeddings = reach
    text.rope_parameters = {**whole, _FULL: made} if _FULL in whole else made
    try:
        text.validate_rope()
    except (KeyError, ValueError, TypeError) as error:
        raise SettingsError(f"rope_scaling={scaling}: transformers refuses it ({error.args[0]}).") from error


def automatic(config: Any, window: int | None) -> Stretch | None:
    """Return how a window that was asked for is reached where no scheme is: None where the model's own holds it.

    A model with a scheme of its own keeps it, with a factor that is as much larger as the window.

    Raises:
        ModelError: the window is above four times the model's own, or cannot be stretched.
    """
    native, whole = native_window(config), getattr(config.get_text_config(), "rope_parameters", None)
    if window is None or native is None or window <= native:
        return None
    own = (whole or {}).get(_FULL, whole) or {}
    kind = own.get("rope_type", "default")
    native = _own_reach(own, native)
    if window <= native:
        # Published with a shorter window than its scheme reaches: as it is, and its config says so.
        return Stretch(dict(own), window)
    if not whole or kind not in ("default", *SCHEMES):
        raise ModelError(
            f"max_seq_length={window} is above this model's own window of {native} positions, which we cannot stretch. "
            f"Use at most {native}."
        )
    if window > _LONGEST * native:
        raise ModelError(
            f"max_seq_length={window} is above {_LONGEST} times this model's own window of {native} positions. Use at "
            f"most {_LONGEST * native}, or say how to stretch it: rope_scaling is one of {', '.join(SCHEMES)}."
        )
    if kind == "default":
        return Stretch(AUTOMATIC, window)
    return Stretch({**own, "factor": own["factor"] * window / native}, window)


def _own_reach(own: dict[str, Any], native: int) -> int:
    """Return the positions that the scheme of a model reaches, which can be more than its config names."""
    trained = own.get("original_max_position_embeddings")
    is_known = own.get("rope_type") in SCHEMES and trained and "factor" in own
    return max(native, round(trained * own["factor"])) if is_known else native


def _scheme(name: str, own: dict[str, Any], native: int, window: int | None, size: int) -> dict[str, Any]:
    if name not in SCHEMES:
        raise SettingsError(f"rope_scaling={name!r}: use {', '.join(SCHEMES)}.{did_you_mean(name, SCHEMES)}")
    if own.get("rope_type", "default") != "default":
        raise SettingsError(
            f"rope_scaling={name!r}: this model has a scheme of its own ({own['rope_type']}). To replace it give all "
            "of its parameters as a dict."
        )
    if window is None or window <= native:
        raise SettingsError(
            f"rope_scaling={name!r} stretches nothing: the model's own window of {native} holds "
            f"max_seq_length={window}. Leave it out, or give a longer max_seq_length."
        )
    factor = window / native
    if name == "dynamic":
        return _turned(own, factor, size)
    made = {**own, "rope_type": name, "factor": factor}
    if name != "linear":
        made["original_max_position_embeddings"] = native
    if name == "llama3":
        made |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return made


def _turned(own: dict[str, Any], factor: float, size: int) -> dict[str, Any]:
    return {**own, "rope_theta": own["rope_theta"] * factor ** (size / (size - 2))}


def _given(scaling: dict[str, Any], own: dict[str, Any], native: int, size: int) -> dict[str, Any]:
    kind = scaling.get("rope_type", scaling.get("type"))
    known = ("default", *SCHEMES)
    if kind not in known:
        raise SettingsError(
            f"rope_scaling={scaling}: rope_type is one of {', '.join(known)}.{did_you_mean(str(kind), known)}"
        )
    for name, value in scaling.items():
        if name not in _KEYS:
            raise SettingsError(f"rope_scaling={scaling}: unknown key {name!r}.{did_you_mean(name, _KEYS)}")
        if name in ("factor", "original_max_position_embeddings") and not (
            isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1
        ):
            raise SettingsError(f"rope_scaling={scaling}: {name} is a number of at least 1.")
    kept = {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if name in own}
    if kind == "dynamic" and "factor" in scaling:
        kept |= {name: scaling[name] for name in kept if name in scaling}
        return {**_turned(kept, scaling["factor"], size), "rope_type": "default"}
    return {**kept, **{name: value for name, value in scaling.items() if name != "type"}, "rope_type": kind}


def _rotary_size(text: Any, own: dict[str, Any]) -> int:
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(size * own.get("partial_rotary_factor", 1.0))
