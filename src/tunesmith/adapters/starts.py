"""What the start of an adapter (``init_lora_weights``) does to its base, and who cannot share that base then."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tunesmith.core.errors import AdapterError

__all__ = [
    "changes_base",
    "embeddings_to_save",
    "read_config",
    "refuse_lost_base",
    "refuse_shared_base",
    "repeats_on_base",
]

_CONFIG = "adapter_config.json"
_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Start of an adapter -> what it did to the base that a reload cannot repeat.
_LOST_BASES = {
    "pissa_niter_": "took a random approximation out of the base",
    "lora_ga": "changed the base by gradients of the training data",
    "corda": "changed the base by statistics of the training data",
    "loftq": "rounded the base to few bits",
}
_REMEDY = (
    "Convert it to a plain adapter where it was trained: PEFT's save_pretrained with "
    "path_initial_model_for_weight_conversion."
)
_REMEDIES = {
    "loftq": "Take the adapter that the finished run saved with its base, or resume the run from this checkpoint."
}


def changes_base(start: Any) -> bool:
    """Return whether an adapter that starts so leaves another base below itself."""
    return isinstance(start, str) and start.startswith(_CHANGING)


def repeats_on_base(start: Any) -> bool:
    """Return whether PEFT repeats at every load what such a start took out of the base."""
    return isinstance(start, str) and start.startswith(("pissa", "olora"))


def embeddings_to_save(asked: str | bool, model: Any, *, has_base: bool) -> str | bool:
    """Return PEFT's ``save_embedding_layers``: "auto" saves a grown embedding, which a base saved beside holds too."""
    if asked != "auto" or not has_base:
        return asked
    targets = model.peft_config["default"].target_modules or ()
    return "auto" if any(end in targets for end in ("embed_tokens", "lm_head")) else False


def read_config(adapter: Path) -> dict[str, Any]:
    """Return adapter_config.json of a folder.

    Raises:
        AdapterError: it is missing or no JSON.
    """
    file = adapter / _CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{adapter} is no adapter folder: {_CONFIG} is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{file} is not valid JSON: {error}. Copy the adapter again.") from None
    return config if isinstance(config, dict) else {}


def refuse_lost_base(adapter: Path) -> None:
    """Some starts change the base by chance, by data or by rounding, and the folder does not hold what it became."""
    start = str(read_config(adapter).get("init_lora_weights", True))
    reason = next((reason for name, reason in _LOST_BASES.items() if start.startswith(name)), None)
    if reason is not None:
        raise AdapterError(
            f"adapter {adapter} started with init_lora_weights={start!r}, which {reason}: on the base as it is its "
            f"answers would be wrong. {_REMEDIES.get(start, _REMEDY)}"
        )


def refuse_shared_base(adapter: Any, starts: Iterable[Any]) -> None:
    """Refuse an adapter on a base that others use too, where one of all these starts changes the base for itself.

    Raises:
        AdapterError: naming the start.
    """
    start = next((start for start in starts if repeats_on_base(start)), None)
    if start is not None:
        raise AdapterError(
            f"adapter {adapter} cannot share its base: one of the adapters was saved with "
            f"init_lora_weights={start!r}, which changes the base for itself. {_REMEDY}"
        )
