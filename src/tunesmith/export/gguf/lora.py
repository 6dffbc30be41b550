"""A LoRA adapter as a GGUF file, which llama.cpp puts on a model while it runs (``--lora``).

Each adapted weight has ``<name>.lora_a`` (R, D) and ``<name>.lora_b`` (F, R); llama.cpp adds alpha / R * B A. There is
one alpha for all: where modules have scales of their own, their B takes up the difference. Rows of B are dealt out
anew where those of the weight are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from peft.tuners.lora import LoraLayer

from tunesmith.adapters.starts import changes_base
from tunesmith.core.errors import AdapterError
from tunesmith.export.gguf.families import Tensor, arranged, tensor_name
from tunesmith.export.weights import check_mergeable, refuse_parted

__all__ = ["adapter_of", "alpha_of", "lora_header", "lora_tensors", "lora_weights"]


def adapter_of(model: Any) -> str:
    """Return the name of the one active adapter of ``model``.

    Raises:
        AdapterError: there is none, several, or one that a GGUF adapter cannot hold.
    """
    names = list(model.active_adapters) if hasattr(model, "peft_config") else []
    if len(names) != 1:
        raise AdapterError(f"save_method='lora' saves one adapter, and {len(names)} are active on this model.")
    config = model.peft_config[names[0]]
    check_mergeable(names[0], config)
    refuse_parted(names[0], config, model)
    init = config.init_lora_weights
    reasons = {
        "use_dora": "DoRA",
        "modules_to_save": "modules that train whole",
        "trainable_token_indices": "rows of the embedding",
    }
    found = [what for name, what in reasons.items() if getattr(config, name, None)]
    found += ["biases"] if config.bias != "none" else []
    found += [f"init_lora_weights={init!r}, which changes the base"] if changes_base(init) else []
    layers = [layer for _, layer in _layers(model, names[0])]
    found += ["an adapted embedding"] if any(names[0] in layer.lora_embedding_A for layer in layers) else []
    if found:
        raise AdapterError(
            f"adapter {names[0]!r} has {found[0]}, which a LoRA in GGUF cannot hold. Leave out save_method='lora': the "
            "merged model can hold it."
        )
    return names[0]


def _layers(model: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A):
            yield name, module


def alpha_of(model: Any, adapter: str) -> float:
    """Return the alpha of the file: that of the first adapted layer."""
    layer = next(layer for _, layer in _layers(model, adapter))
    return float(layer.scaling[adapter] * layer.r[adapter])


def lora_tensors(model: Any, adapter: str) -> Iterator[Tensor]:
    """Yield the tensors of the file of ``adapter``."""
    config, alpha = model.get_base_model().config, alpha_of(model, adapter)
    for name, layer in _layers(model, adapter):
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        target, share = tensor_name(config, f"{name}.weight"), layer.scaling[adapter] * layer.r[adapter] / alpha
        yield Tensor(f"{target}.lora_a", tuple(a.shape), lambda a=a: _numpy(a))
        yield Tensor(
            f"{target}.lora_b",
            tuple(b.shape),
            lambda b=b, name=name, share=share: arranged(config, f"{name}.weight", _numpy(b) * np.float32(share)),
        )


def lora_weights(model: Any, adapter: str) -> dict[str, np.ndarray]:
    """Return llama.cpp's name -> what ``adapter`` adds to that weight, as PEFT computes it, arranged for llama.cpp."""
    config = model.get_base_model().config
    return {
        tensor_name(config, f"{name}.weight"): arranged(
            config, f"{name}.weight", _numpy(layer.get_delta_weight(adapter))
        )
        for name, layer in _layers(model, adapter)
    }


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def lora_header(name: str, alpha: float) -> Any:
    """Return what writes the values of an adapter file."""

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)

    return write
