"""Where the attributes of a library come from: finds those that another package put there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "trl")


def replaced_by(package: str, modules: Mapping[str, ModuleType | None]) -> list[str]:
    """Return the attributes of loaded library modules, and of classes defined there, whose code is in ``package``."""
    found: list[str] = []
    for name, module in sorted(modules.items()):
        if module is None or name.partition(".")[0] not in LIBRARIES:
            continue
        # vars() and not getattr(): lazy modules would import half of transformers.
        for attribute, value in _settled(vars(module)):
            if _home(value) == package:
                found.append(f"{name}.{attribute}")
            elif issubclass(type(value), type) and value.__module__ == name:
                found += [f"{name}.{attribute}.{own}" for own, v in _settled(vars(value)) if _home(v) == package]
    return found


def attributes(modules: Mapping[str, ModuleType]) -> dict[str, int]:
    """Return the identity of every function and class of ``modules`` and of every method of their classes."""
    found: dict[str, int] = {}
    for name, module in modules.items():
        for attribute, value in _settled(vars(module)):
            if isinstance(value, (FunctionType, type)):
                found[f"{name}.{attribute}"] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{attribute}.{own}": id(v) for own, v in _settled(vars(value)) if callable(v)}
    return found


def _settled(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from list(values.items())


def _home(value: Any) -> str:
    # type() and not isinstance(): some module attributes act when they are touched.
    kind = type(value)
    if kind in (classmethod, staticmethod):
        value = value.__func__
        kind = type(value)
    if kind is not FunctionType and not issubclass(kind, type):
        return ""
    return (value.__module__ or "").partition(".")[0]
