"""Versions of the libraries we stand on, and every place where a difference between them matters to us.

Each difference carries the condition under which it can be removed.
"""

from __future__ import annotations

import importlib.metadata

__all__ = ["STACK", "installed", "stack_versions"]

STACK = (
    "tunesmith",
    "torch",
    "transformers",
    "peft",
    "accelerate",
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


def stack_versions() -> dict[str, str]:
    """Return the versions that decide what a run computes, for records and model cards; the missing are left out."""
    found = {name: installed(name) for name in STACK}
    return {name: version for name, version in found.items() if version}
