"""Which implementation of an op runs: a plain table, decided per call from device and dtype, with the reason.

Every op has a readable ``reference`` (autograd does its backward), and primitives that compute forward and backward
into buffers of the caller: ``cpu`` in plain torch (it runs on any device), ``triton`` on a GPU. ``explain`` says what
would run and why; a GPU that falls back to ``cpu`` says so once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["OPS", "Choice", "choose", "explain", "primitives"]

_log = logging.getLogger(__name__)

# op -> implementations beside the reference, the preferred first.
_TABLE: dict[str, tuple[str, ...]] = {
    "attention_varlen": ("cuda", "cpu"),
    "float8": ("triton", "cpu"),
    "linear_cross_entropy": ("triton", "cpu"),
    "lora_linear": ("cpu",),
    "quantized": ("cuda", "cpu"),
    "rms_norm": ("triton", "cpu"),
    "rope": ("triton", "cpu"),
    "swiglu": ("triton", "cpu"),
}

OPS = tuple(_TABLE)
"""The names of all ops."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation of an op for one call, and why."""

    op: str
    implementation: str
    reason: str


def choose(op: str, x: torch.Tensor) -> Choice:
    """Return which primitives of ``op`` compute on ``x``.

    Raises:
        KeyError: there is no such op; the message lists those there are.
    """
    if op not in _TABLE:
        raise KeyError(f"no op {op!r}; there are {', '.join(sorted(_TABLE))}")
    return _choose(op, x.device.type, str(x.dtype).removeprefix("torch."))


@functools.cache
def _choose(op: str, device: str, dtype: str) -> Choice:
    preferred = _TABLE[op][0]
    if preferred == "cpu":
        return Choice(op, "cpu", "torch's matrix products, on every device")
    if device != "cuda":
        return Choice(op, "cpu", f"{device} tensor; {preferred} kernels need a GPU")
    if dtype == "float64" or (preferred == "cuda" and dtype == "float32"):
        return Choice(op, "cpu", f"{preferred} kernels do not compute {dtype}")
    if preferred == "triton" and importlib.util.find_spec("triton") is None:
        _log.warning("%s runs in plain torch, slower: the package triton is not installed", op)
        return Choice(op, "cpu", "the package triton is not installed")
    return Choice(op, preferred, f"CUDA device, {dtype}")


def primitives(op: str, x: torch.Tensor) -> ModuleType:
    """Return the module with the forward and backward of ``op`` for ``x``."""
    return _module(op, choose(op, x).implementation)


@functools.cache
def _module(op: str, implementation: str) -> ModuleType:
    return importlib.import_module(f"tunesmith.ops.{op}.{implementation}")


def explain(op: str, x: torch.Tensor) -> str:
    """Return a line that says which implementation of ``op`` runs on ``x``, and why."""
    choice = choose(op, x)
    return f"{op}: {choice.implementation} ({choice.reason})"
