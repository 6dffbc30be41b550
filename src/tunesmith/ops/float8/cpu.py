"""Rows rounded to float8 in plain torch, a block of rows at a time."""

from __future__ import annotations

import torch

from tunesmith.ops.float8 import reference
from tunesmith.ops.rows import row_blocks

__all__ = ["quantize_rows"]


def quantize_rows(x: torch.Tensor, factor: torch.Tensor | None, codes: torch.Tensor) -> torch.Tensor:
    """Write the codes of ``x * factor`` (T, D) to ``codes`` and return the scales (T, 1) float32."""
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    for part in row_blocks(len(x), x.shape[1], 4):
        codes[part], scales[part] = reference.quantize_rows(x[part], factor)
    return scales
