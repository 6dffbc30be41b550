"""Float8 products in plain torch: the definitions that rounding and products are compared with."""

from __future__ import annotations

import torch

__all__ = ["E4M3_MAX", "LEAST_SCALE", "quantize_rows", "scaled_mm"]

E4M3_MAX = 448.0
"""The largest number in float8 e4m3."""
LEAST_SCALE = 1e-30
"""Smaller scales stand for zeros, and would not be float32 numbers with an inverse."""


def quantize_rows(x: torch.Tensor, factor: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (T, D) float8_e4m3fn and scales (T, 1) float32 of ``x * factor``."""
    values = x.float() if factor is None else x.float() * factor
    scales = values.abs().amax(dim=1, keepdim=True) / E4M3_MAX
    scales = torch.where(scales <= LEAST_SCALE, 1.0, scales)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    return (values / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scales_a: torch.Tensor, scales_b: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Write ``(a * scales_a) @ (b * scales_b)`` to ``out`` (T, F), in float32 or the dtype of ``out`` if that is wider.

    ``a`` (T, D) and ``b`` (D, F) are float8, ``scales_a`` (T, 1) and ``scales_b`` (1, F) float32.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    return out.copy_((a.to(wide) @ b.to(wide)) * scales_a * scales_b)
