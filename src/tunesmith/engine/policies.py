"""What a decoder layer keeps for its backward, what it computes again, and the bytes of each choice.

============ ==================================================================== ===================================
policy       kept per token                                                       computed again in the backward
============ ==================================================================== ===================================
none         x, q, k, v, o, x2, gate, up, low-rank inputs, statistics             norms, rotation of normed heads, act
sel_mlp      the same without gate and up                                         + the product of gate and up
sel_min      x, o, what attention keeps, input of the last product's adapter      + q, k, v and o products
full         x, input of the last product's adapter                               + attention; never the last product
offload      as full, but x goes to host memory or a file                         as full
============ ==================================================================== ===================================

The output of the down projection is never needed again, so no policy computes it twice (but where a norm stands behind
it, its input is kept or computed again). Gradients are the same under every policy, bit for bit in float64: what is
computed again is computed by the same functions on the same numbers.
"""

from __future__ import annotations

from enum import StrEnum

from tunesmith.engine.families import LayerShape

__all__ = ["Policy", "kept_names", "kept_values"]


class Policy(StrEnum):
    """How much of a layer is kept between forward and backward."""

    NONE = "none"
    SEL_MLP = "sel_mlp"
    SEL_MIN = "sel_min"
    FULL = "full"
    OFFLOAD = "offload"


_ATTENTION = ("qkv", "s_qkv")
_MIDDLE = ("s_o", "x2")
_ATTENDED = ("o", "s_down", "z")
_KEPT = {
    Policy.NONE: (*_ATTENTION, *_ATTENDED, *_MIDDLE, "y", "gate_up", "s_gate_up"),
    Policy.SEL_MLP: (*_ATTENTION, *_ATTENDED, *_MIDDLE, "y"),
    Policy.SEL_MIN: _ATTENDED,
    # A rank's width; from the recomputed activation it would differ by rounding, and cost a product.
    Policy.FULL: ("s_down",),
    Policy.OFFLOAD: ("s_down",),
}


def kept_names(policy: Policy, shape: LayerShape) -> tuple[str, ...]:
    """Return the names of the intermediates that a layer keeps beside its input; y and z only where norms need them."""
    return tuple(name for name in _KEPT[policy] if shape.has_post_norms or name not in ("y", "z"))


def kept_values(policy: Policy, shape: LayerShape, hidden: int, ffn: int, ranks: tuple[int, int, int, int]) -> int:
    """Return how many values of the compute dtype one layer keeps per token, its input included.

    ``ranks`` are the summed ranks of the four groups. What CUDA's attention keeps (a float32 a head) is not counted.
    """
    width = {
        "qkv": (shape.heads + 2 * shape.key_heads) * shape.head_dim,
        "s_qkv": ranks[0],
        "o": shape.heads * shape.head_dim,
        "s_o": ranks[1],
        "x2": hidden,
        "y": hidden,
        "z": hidden,
        "gate_up": 2 * ffn,
        "s_gate_up": ranks[2],
        "s_down": ranks[3],
    }
    own_input = 0 if policy is Policy.OFFLOAD else hidden
    return own_input + sum(width[name] for name in kept_names(policy, shape))
