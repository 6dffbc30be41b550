"""LoRA in plain torch: the definition that the fast path is compared with."""

from __future__ import annotations

import torch

__all__ = ["lora_linear"]


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (..., F); the arguments are those of the public ``lora_linear``."""
    low_rank = torch.nn.functional.linear(torch.nn.functional.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return torch.nn.functional.linear(x, weight, bias) + scale * low_rank
