"""How an adapter starts, and what it takes to save one whose start took something out of the base.

PiSSA and OLoRA put the largest directions of a weight into A and B and take them out of the base: W_res = W - s B0 A0.
What such an adapter adds to the base as it was is s (B A - B0 A0), a plain adapter of twice the rank:

    A' = [A; A0]    B' = [B, -B0]    with the same scale s

:class:`StartedPeftModel` keeps A0 and B0 and saves that, so that the folder works on the untouched base everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModelForCausalLM

from tunesmith.core.errors import AdapterError
from tunesmith.engine.read import is_quantized

if TYPE_CHECKING:
    import torch

__all__ = ["StartedPeftModel", "keep_start", "raw_weights", "refuse_quantized"]

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def refuse_quantized(model: Any) -> None:
    """Refuse to take anything out of a quantized base.

    Raises:
        AdapterError: what is left of a weight would be rounded again, and A and B hold nothing of that.
    """
    if any(is_quantized(module) for module in model.modules()):
        raise AdapterError(
            "this init_lora_weights changes the base, and a quantized base would be rounded again by that. Load the "
            "base in 16 bits, or use True, 'gaussian' or 'orthogonal'."
        )


def keep_start(model: Any) -> None:
    """Make the adapted ``model``, whose start has just changed its base, save what belongs on the base as it was."""
    model.__class__ = StartedPeftModel
    model.started = {name: value.detach().to("cpu", copy=True) for name, value in _adapter_weights(model).items()}
    model.saves_raw = False


@contextmanager
def raw_weights(model: Any) -> Iterator[None]:
    """Let ``model`` save A and B as they are for the block: for a checkpoint of a run, which starts the same way."""
    is_started = isinstance(model, StartedPeftModel)
    if is_started:
        model.saves_raw = True
    try:
        yield
    finally:
        if is_started:
            model.saves_raw = False


class StartedPeftModel(PeftModelForCausalLM):
    """A PEFT model whose first adapter started by taking something out of the base."""

    started: dict[str, torch.Tensor]
    saves_raw: bool

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as PEFT does, the first adapter as a plain one of twice the rank that belongs on the untouched base."""
        super().save_pretrained(save_directory, *args, **kwargs)
        selected = kwargs.get("selected_adapters") or ["default"]
        if not self.saves_raw and "default" in selected and kwargs.get("is_main_process", True):
            _convert(Path(save_directory), self.started)


def _adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name="default")
    return {name: value for name, value in found.items() if "lora_A" in name or "lora_B" in name}


def _convert(folder: Path, started: dict[str, torch.Tensor]) -> None:
    """Turn the adapter that was saved in ``folder`` into A', B' and a config that says so."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / _WEIGHTS)
    for name, first in started.items():
        now = tensors[name]
        parts, axis = ([now, first], 0) if "lora_A" in name else ([now, -first], 1)
        tensors[name] = torch.cat([part.to(now.dtype) for part in parts], dim=axis).contiguous()
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    # alpha / r and alpha / sqrt(r) stay what they were at twice the rank.
    factor = 2**0.5 if config.get("use_rslora") else 2
    config |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}
    for name, times in (("rank_pattern", 2), ("alpha_pattern", factor)):
        config[name] = {key: times * value for key, value in (config.get(name) or {}).items()}
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
