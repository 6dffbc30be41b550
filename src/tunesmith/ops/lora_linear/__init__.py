"""A frozen linear layer with its low-rank adapter, as one function.

``reference.py`` is the definition; ``function.py`` the fast path with a hand-written backward.
"""

from __future__ import annotations

import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.lora_linear import reference
from tunesmith.ops.lora_linear.function import LoraLinear

__all__ = ["lora_linear", "reference"]


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + scale * (x @ a.T) @ b.T + bias`` with ``weight`` and ``bias`` frozen.

    Equals :func:`reference.lora_linear`. Computes in the dtype of ``x``; never forms ``b @ a`` (F, D) and saves only
    ``x`` and ``x @ a.T``. ``a`` and ``b`` may be float32 masters beside a 16-bit base: each is rounded once (``b``
    after the scale), and the adapter's product is added to the base's in the accumulator of the matrix product.

    Args:
        x: (..., D) float32, bfloat16, float16 or float64; may be non-contiguous.
        weight: (F, D), same dtype as ``x``. Never receives a gradient.
        a: (R, D) and
        b: (F, R), of any floating dtype, in which their gradients come back.
        bias: (F,), frozen.
    Raises:
        ShapeError: an inner dimension differs; the message prints the shapes.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3. Backward derived in ``function.py``.
    """
    fits = x.shape[-1] == weight.shape[1] == a.shape[1] and a.shape[0] == b.shape[1] and b.shape[0] == weight.shape[0]
    if not fits:
        raise ShapeError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)} do not fit: "
            "(..., D), (F, D), (R, D) and (F, R) are needed"
        )
    return LoraLinear.apply(x, weight, a, b, bias, scale)  # type: ignore[no-any-return]
