"""Products in float8 e4m3: rows rounded to it as they come, times a frozen weight that is stored in it.

``reference.py`` is the definition, ``cpu.py`` and ``triton.py`` round rows, ``products.py`` multiplies on a GPU.
"""

from __future__ import annotations

import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.dispatch import primitives
from tunesmith.ops.float8 import reference
from tunesmith.ops.float8.products import Float8Product, why_not

__all__ = ["Float8Product", "quantize_rows", "reference", "why_not"]


def quantize_rows(x: torch.Tensor, *, factor: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x * factor`` in float8 e4m3 and the scale of each row: ``codes * scales`` is near it.

    Equals :func:`reference.quantize_rows`: computed in float32, a row's largest value at 448. What is not finite makes
    its row's scale NaN; a row of zeros, or of values below 4e-28, is zeros with a scale of 1.

    Args:
        x: (T, D), floating, rows may lie apart.
        factor: (D,) float32, or None for ones.
    Returns:
        codes (T, D) float8_e4m3fn and scales (T, 1) float32.
    Raises:
        ShapeError: ``x`` has not two axes, the last of them dense, or ``factor`` does not fit.
    """
    fits = x.ndim == 2 and x.stride(1) == 1 and (factor is None or factor.shape == x.shape[1:])
    if not fits:
        given = None if factor is None else tuple(factor.shape)
        raise ShapeError(f"x {tuple(x.shape)}, factor {given} do not fit: (T, D) with dense rows and (D,) are needed")
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return codes, primitives("float8", x).quantize_rows(x, factor, codes)
