"""Linear layers whose frozen weight is stored in float8 e4m3, with a scale a row or a block.

A layer that was loaded becomes one of these in place, so that hooks on it and names of it stay. Fused layers read the
codes through ``ops/quantized``; by itself the layer computes with the numbers that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tunesmith.core.device import choose_device
from tunesmith.ops.float8 import why_not
from tunesmith.ops.quantized import Float8Weight, quantize_float8, quantized_linear

__all__ = ["Float8Linear", "store_in_float8", "why_no_products"]


class Float8Linear(nn.Linear):
    """A linear layer with a float8 weight; made by :func:`store_in_float8`.

    Attributes:
        weight: (F, D) uint8, the bytes of the codes. As float8 they would be floating numbers to everyone who casts
            what is floating, and a cast leaves out the scales.
        scales: float32, see :class:`~tunesmith.ops.quantized.Float8Weight`.
        is_blocked: whether the scales are those of blocks.
    """

    scales: torch.Tensor
    is_blocked: bool

    @property
    def stored(self) -> Float8Weight:
        """The weight as it is stored."""
        return Float8Weight(self.weight.data.view(torch.float8_e4m3fn), self.scales, self.is_blocked)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., F) in the dtype of ``x`` (..., D)."""
        return quantized_linear(x, self.stored, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        scales = self.scales
        # As integers they are moved with the model, and not cast with it.
        return super()._apply(
            lambda t: fn(t.view(torch.int32)).view(torch.float32) if t is scales else fn(t), recurse=recurse
        )


def why_no_products(model: Any, *, dtype: torch.dtype) -> str | None:
    """Return the reason why fused layers do not multiply in float8 in training steps of ``model``, or None.

    Products are in float8 for all of its layers or not at all. A model without values is one for this machine's device.
    """
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    if not layers:
        return "no layer is stored in float8"
    for layer in layers:
        device = choose_device() if layer.weight.is_meta else layer.weight.device
        shape = (layer.out_features, layer.in_features)
        reason = why_not(shape, is_blocked=layer.is_blocked, dtype=dtype, device=device)
        if reason is not None:
            return reason
    return None


def store_in_float8(layer: nn.Linear, *, by_block: bool, device: torch.device | None = None) -> None:
    """Make ``layer`` a :class:`Float8Linear` in place, its weight rounded on ``device`` (None: where it lies).

    On the meta device only shapes change.
    """
    weight = layer.weight.data
    stored = quantize_float8(weight if device is None else weight.to(device), by_block=by_block)
    layer.__class__ = Float8Linear
    layer.weight = nn.Parameter(stored.codes.view(torch.uint8), requires_grad=False)
    layer.register_buffer("scales", stored.scales)
    layer.is_blocked = by_block  # type: ignore[assignment]
