"""A frozen linear layer in float8, forward and backward, on GPUs that multiply it.

For a weight W = diag(w) C with codes C (F, D) and a scale w a row, and rows q(x) = diag(s) X in float8:

    y = q(x) W^T = diag(s) (X C^T) diag(w)          dx = q(dy diag(w)) C

The scales of W go into dy before that is rounded, so that forward and backward read the same codes: only activations
and their gradients are rounded. A product wants its second operand column by column: that is how C lies for the
forward; for the backward it is turned on the way, a byte a weight, so that there is no second copy of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tunesmith.core.device import computes_float8
from tunesmith.ops.dispatch import primitives
from tunesmith.ops.quantized.weights import Float8Weight

__all__ = ["Float8Product", "scaled_mm", "why_not"]

_MULTIPLE = 16


def why_not(shape: tuple[int, int], *, is_blocked: bool, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the reason why products with a weight of ``shape`` do not run in float8, or None where they do."""
    if not computes_float8(device):
        return f"{device.type} does not multiply float8"
    if is_blocked:
        return "a scale belongs to a block, and not to a row"
    if dtype != torch.bfloat16:
        return f"the model computes in {str(dtype).removeprefix('torch.')}, and float8 products give bfloat16"
    if any(size % _MULTIPLE for size in shape):
        return f"a weight is {shape[0]} by {shape[1]}, and float8 products take multiples of {_MULTIPLE}"
    return None


@dataclass(frozen=True, slots=True)
class Float8Product:
    """Products with a weight in float8.

    Attributes:
        weight: (F, D) with a scale a row.
        scratch: ``scratch(name, like, *shape)`` gives a buffer that is used again.
    """

    weight: Float8Weight
    scratch: Callable[..., torch.Tensor]

    def forward(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """Write y (T, F) for ``x`` (T, D) to ``out``, contiguous bfloat16."""
        codes, scales = self._rows(x, None)
        return scaled_mm(codes, self.weight.codes.t(), scales, self.weight.scales.view(1, -1), out)

    def input_gradient(self, dy: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """Write dx (T, D) for ``dy`` (T, F) to ``out``, contiguous bfloat16."""
        own = self.weight.codes
        codes, scales = self._rows(dy, self.weight.scales.view(-1))
        turned = self.scratch("turned", own, *own.t().shape)
        turned.view(torch.uint8).copy_(own.view(torch.uint8).t())
        return scaled_mm(codes, turned.t(), scales, scales.new_ones(1, own.shape[1]), out)

    def _rows(self, x: torch.Tensor, factor: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self.scratch("codes", self.weight.codes, *x.shape)
        return codes, primitives("float8", x).quantize_rows(x, factor, codes)


def scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scales_a: torch.Tensor, scales_b: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Write ``(a * scales_a) @ (b * scales_b)`` to ``out`` and return it; see ``reference.scaled_mm``.

    ``a`` lies row by row, ``b`` column by column.
    """
    return torch.ops.aten._scaled_mm.out(a, b, scales_a, scales_b, out_dtype=out.dtype, use_fast_accum=True, out=out)
