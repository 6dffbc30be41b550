"""Versions of the libraries we stand on, and every place where a difference between them matters to us.

Each difference carries the condition under which it can be removed.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from tunesmith.core.errors import ModelError

__all__ = ["STACK", "auto_image_processor", "checkpoint_layers", "installed", "keep_softcap", "stack_versions"]

STACK = (
    "tunesmith",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "torchao",
    "datasets",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
)


def installed(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def auto_image_processor() -> Any:
    """Return the class ``AutoImageProcessor`` of transformers.

    Older versions hide it at the top of the package where torchvision is missing, although it needs none; the import
    from its own module goes when our floor is a version that has the class at the top then too (5.23 has).
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor


def checkpoint_layers(model: Any, on: bool) -> None:
    """Switch recomputation of decoder layers in the backward pass on a transformers model.

    transformers 5.2x renames gradient checkpointing to activation checkpointing; the older name goes when our floor
    is a version that has the newer one.
    """
    new = hasattr(model, "activation_checkpointing_enable")
    word = "activation" if new else "gradient"
    if not on:
        getattr(model, f"{word}_checkpointing_disable")()
        return
    getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})


def keep_softcap(model: Any, asked: str | None = None) -> None:
    """Have a model of transformers cap its attention scores where its config says so (Gemma 2).

    Older versions compute such models by SDPA, which leaves the cap out in silence. Goes when our floor is a version
    whose classes say that they do not support SDPA (5.23 is).

    Args:
        asked: the ``attn_implementation`` that the user has named.
    Raises:
        ModelError: that is "sdpa".
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is None or config._attn_implementation != "sdpa":
        return
    if asked == "sdpa":
        raise ModelError(f"attn_implementation='sdpa' leaves out the softcap of {type(model).__name__}. Use 'eager'.")
    model.set_attn_implementation("eager")


def stack_versions() -> dict[str, str]:
    """Return the versions that decide what a run computes, for records and model cards; the missing are left out."""
    found = {name: installed(name) for name in STACK}
    return {name: version for name, version in found.items() if version}
