"""Models that see: which ones they are, the transformers class that loads them, and where their parts lie.

A vision-language model has a tower for images beside its language model. It is loaded whole, whichever of our classes
loads it, and runs as transformers wrote it: images need attention masks (gemma3) and positions (qwen2-vl) of their own,
which the fused layers do not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NOT_FUSED", "auto_class", "has_vision", "outside_decoder", "towers"]

NOT_FUSED = "layers run as transformers wrote them, slower: images need attention masks and positions of their own"


def has_vision(config: Any) -> bool:
    """Say whether a config is that of a model from images and text to text."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return getattr(config, "vision_config", None) is not None and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads the model of a config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM


def towers(model: nn.Module) -> dict[str, str]:
    """Return "language", "vision" and "audio" -> the name of that module inside ``model``, for those that are there.

    They are what transformers' own ``get_decoder`` and ``get_encoder`` find.
    """
    base: Any = model
    found = {
        "language": base.get_decoder(),
        "vision": base.get_encoder(modality="image"),
        "audio": base.get_encoder(modality="audio"),
    }
    names = {id(module): name for name, module in model.named_modules()}
    # A model without such an encoder gives itself.
    whole = (id(model), id(base.base_model))
    return {part: names[id(module)] for part, module in found.items() if id(module) not in whole}


def outside_decoder(config: Any) -> list[str]:
    """Return the names of the modules that are not quantized: all beside the language model, and the output head."""
    import torch

    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    decoder = towers(model)["language"]
    base, _, last = decoder.rpartition(".")
    beside = [f"{base}.{name}" for name, _ in model.get_submodule(base).named_children() if name != last]
    head = model.get_output_embeddings()
    return [*beside, *(name for name, module in model.named_modules() if module is head)]
