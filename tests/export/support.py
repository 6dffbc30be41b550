"""Tiny models with an adapter that has moved, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunesmith import FastLanguageModel
from tunesmith.models.quantize import protect_gradients


def logits(model: Any) -> torch.Tensor:
    protect_gradients(model)  # bitsandbytes itself fails at layers this small on processors with AVX512-BF16
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.arange(12, device=model.device)[None] * 7 % 300, use_cache=False
        ).logits.cpu()


def adapt(model: Any, **arguments: Any) -> Any:
    settings = {"r": 4, "use_gradient_checkpointing": False, "init_lora_weights": False, **arguments}
    return FastLanguageModel.get_peft_model(model, **settings)


def disturb(model: Any) -> Any:
    """Move every trained weight, as training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def loaded(folder: Path, **arguments: Any) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(str(folder), **{"dtype": "float32", **arguments})
