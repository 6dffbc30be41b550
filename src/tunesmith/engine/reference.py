"""One decoder layer in plain torch: the definition that the fused layer is compared with.

It computes in the dtype of its input and casts nowhere (but a softmax in 16 bits); autograd does the backward. So it is
the truth in float64, which transformers is not: that rounds to float32 inside norms, rotation and loss. No tricks:
nothing is stacked, fused, kept or skipped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tunesmith.engine.layer import DOWN, GATE_UP, QKV, Group, LayerCall, O
from tunesmith.ops.attention_varlen.reference import attention_varlen
from tunesmith.ops.rms_norm.reference import rms_norm
from tunesmith.ops.rope.reference import norm_rotate, rotate
from tunesmith.ops.swiglu.reference import swiglu

__all__ = ["decoder_layer"]


def decoder_layer(
    x: torch.Tensor, call: LayerCall, *, masks: Mapping[tuple[int, int], torch.Tensor] | None = None
) -> torch.Tensor:
    """Return what ``FusedLayer.apply(x, call, *call.parameters)`` returns: (T, D), or (N, D) for the rows asked for.

    ``masks`` are what dropout multiplies the inputs of adapters by: (group, projection in the group) -> (T or N, D).
    """
    shape, masks = call.shape, masks or {}

    def project(group: int, h: torch.Tensor) -> torch.Tensor:
        own = {index: mask for (number, index), mask in masks.items() if number == group}
        return _project(call.groups[group], h, own)

    def normed(h: torch.Tensor, which: int) -> torch.Tensor:
        weight = call.norms[which]
        return h if weight is None else rms_norm(h, weight, eps=shape.eps, offset=shape.offset)

    qkv = project(QKV, normed(x, 0)).unflatten(-1, (-1, shape.head_dim))
    q, k, v = qkv.split((shape.heads, shape.key_heads, shape.key_heads), dim=1)
    if call.head_norms is None:
        q, k = (rotate(heads, call.cos, call.sin) for heads in (q, k))
    else:
        q, k = (
            norm_rotate(heads, weight, call.cos, call.sin, eps=shape.eps, offset=shape.offset)
            for heads, weight in zip((q, k), call.head_norms, strict=True)
        )
    o = attention_varlen(
        *(heads.transpose(0, 1) for heads in (q, k, v)),
        call.lengths,
        scale=shape.scale,
        window=shape.window,
        softcap=shape.softcap,
    ).flatten(1)
    if call.rows is not None:
        x, o = x[call.rows], o[call.rows]
    x2 = x + normed(project(O, o), 1)
    gate_up = project(GATE_UP, normed(x2, 2))
    return x2 + normed(project(DOWN, swiglu(gate_up, activation=shape.activation)), 3)


def _project(group: Group, h: torch.Tensor, masks: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return the outputs of the projections of ``group`` side by side."""
    outputs: list[torch.Tensor] = []
    for index, p in enumerate(group.projections):
        y = torch.nn.functional.linear(h, p.weight, p.bias)
        if p.a is not None and p.b is not None:
            seen = h * masks[index] if index in masks else h
            y = y + p.scale * (seen @ p.a.to(h.dtype).t()) @ p.b.to(h.dtype).t()
        outputs.append(y)
    return torch.cat(outputs, dim=-1)
