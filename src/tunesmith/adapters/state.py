"""Adapters on disk: plain PEFT folders, loaded onto the base that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import AdapterError, ModelError
from tunesmith.models.aliases import ALIASES, ModelSource, find_model
from tunesmith.models.load import facts_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["attach_adapter", "base_of"]

_WEIGHTS = "adapter_model.safetensors"


def base_of(adapter: Path) -> ModelSource:
    """Return the source of the base model that an adapter folder names.

    Raises:
        AdapterError: adapter_config.json is missing, unreadable or names no base, or the weights are missing.
        ModelError: the base is not found where the adapter says it is.
    """
    file = adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{adapter} is no adapter folder: adapter_config.json is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{file} is not valid JSON: {error}. Copy the adapter again.") from None
    if not (adapter / _WEIGHTS).is_file():
        raise AdapterError(f"{adapter}: {_WEIGHTS} is missing. Copy the adapter again.")
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise AdapterError(f"{file} names no base model. Load the base and give the adapter beside it.")
    try:
        return find_model(base)
    except ModelError as error:
        packaged = _alias_of(base)
        if packaged is not None:
            return find_model(packaged)
        raise ModelError(
            f"adapter {adapter}: its base {base!r} is not there. Put the base back, or write its place into "
            f"{file} as base_model_name_or_path."
        ) from error


def attach_adapter(model: PreTrainedModel, adapter: Path, *, trainable: bool = True) -> PeftModel:
    """Load an adapter folder onto its base.

    Raises:
        AdapterError: the weights are corrupt, or do not fit the base (other names or shapes), or are incomplete.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    from tunesmith.engine.lora import fused_lora

    try:
        config: Any = PeftConfig.from_pretrained(str(adapter))
        if getattr(config, "init_lora_weights", True) not in (True, False, "gaussian"):
            # Other starts change the base; a plain load would then add the adapter to the wrong weights.
            config.init_lora_weights = True
        adapted = PeftModel.from_pretrained(model, str(adapter), config=fused_lora(config), is_trainable=trainable)
    except SafetensorError as error:
        raise AdapterError(
            f"{adapter / _WEIGHTS} is corrupt or cut short ({error}). Copy the adapter again."
        ) from error
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapterError(f"adapter {adapter} does not fit its base {facts_of(model).name}: {first[:300]}") from error
    _refuse_foreign_keys(adapter, adapted)
    adapted.tunesmith_facts = facts_of(model)
    return adapted


def _refuse_foreign_keys(adapter: Path, adapted: PeftModel) -> None:
    """PEFT only warns about tensors that fit nothing and leaves missing ones random."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(str(adapter / _WEIGHTS), framework="pt") as opened:
        stored = set(opened.keys())
    expected = set(get_peft_model_state_dict(adapted))
    if stored != expected:
        extra, missing = sorted(stored - expected), sorted(expected - stored)
        what = f"{len(missing)} tensors are missing ({missing[0]})" if missing else f"{len(extra)} unknown ({extra[0]})"
        raise AdapterError(f"adapter {adapter} does not fit its base: {what}.")


def _alias_of(base: str) -> str | None:
    """Return the built-in name whose converted folder ``base`` was, when the cache has been emptied since."""
    folder = Path(base).name
    return next((name for name, packaged in ALIASES.items() if folder.startswith(Path(packaged.file).stem)), None)
