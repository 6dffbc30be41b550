"""Loops over operations that do not hold Python's lock.

Lanes (``training/lanes.py``) compute in two threads. Each operation that Python calls takes the interpreter's lock
again when it is done, and while one thread has it the other one sleeps: with hundreds of small operations a layer that
cost a sixth of a step. TorchScript runs the same operations in the same order from C++. A GPU has no lanes, and
TorchScript would fuse operations there: its tensors go through the function as it is written.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["scripted"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
# torch has no script for Python 3.14 and later. Functions then run as they are: slower, with the same results.
_AVAILABLE = hasattr(torch.jit, "script") and sys.version_info < (3, 14)


def scripted(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return ``function`` as TorchScript for a CPU, made when first called.

    Its first argument is a tensor, the others are tensors, numbers and lists of them, given by position. A tensor in 16
    bits must not meet a float there by ``*`` or ``mul_``, unless it is a power of two: TorchScript rounds the float to
    16 bits first.
    """
    if not _AVAILABLE:
        return function
    lock, made = threading.Lock(), list[Callable[_P, _R]]()

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if args[0].device.type != "cpu":  # type: ignore[attr-defined]
            return function(*args, **kwargs)
        if not made:
            with lock, warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                made[:] = [torch.jit.script(function)]
        return made[0](*args, **kwargs)

    return run
