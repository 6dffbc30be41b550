"""Gated activations: SwiGLU and GeGLU.

``reference.py`` is the definition, ``function.py`` the autograd function, ``cpu.py`` and ``triton.py`` its primitives.
"""

from __future__ import annotations

import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.swiglu import reference
from tunesmith.ops.swiglu.function import SwiGLU

__all__ = ["ACTIVATIONS", "reference", "swiglu"]

ACTIVATIONS = ("silu", "gelu_tanh")
"""Activations of the gate: SwiGLU, and GeGLU with the tanh approximation (Gemma)."""


def swiglu(gate_up: torch.Tensor, *, activation: str = "silu") -> torch.Tensor:
    """Return ``act(gate) * up``.

    Equals :func:`reference.swiglu`; computes in float32 (float64 for float64) and rounds once. Saves only its input.

    Args:
        gate_up: (..., 2F), gate first.
        activation: one of :data:`ACTIVATIONS`.
    Returns:
        (..., F) in the dtype of ``gate_up``.
    Raises:
        ShapeError: the last axis is odd, or the activation is unknown.
    Source: Shazeer 2020, arXiv:2002.05202. Backward derived in ``cpu.py``.
    """
    if gate_up.shape[-1] % 2 or activation not in ACTIVATIONS:
        raise ShapeError(
            f"gate_up {tuple(gate_up.shape)}, activation {activation!r}: an even last axis and one of "
            f"{', '.join(ACTIVATIONS)} are needed"
        )
    flat = gate_up.reshape(-1, gate_up.shape[-1])
    return SwiGLU.apply(flat, activation).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)  # type: ignore[no-any-return]
