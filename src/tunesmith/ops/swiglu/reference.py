"""Gated activations in plain torch: the definition that the fast paths are compared with."""

from __future__ import annotations

import torch

__all__ = ["swiglu"]


def swiglu(gate_up: torch.Tensor, *, activation: str = "silu") -> torch.Tensor:
    """Return (..., F) of (..., 2F), gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
