"""Versions of the libraries we stand on, and every place where a difference between them matters to us.

Each difference carries the condition under which it can be removed.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

__all__ = ["STACK", "checkpoint_layers", "installed", "stack_versions"]

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


def stack_versions() -> dict[str, str]:
    """Return the versions that decide what a run computes, for records and model cards; the missing are left out."""
    found = {name: installed(name) for name in STACK}
    return {name: version for name, version in found.items() if version}
