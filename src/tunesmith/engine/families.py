"""Which decoder layers the engine knows, and which child of such a layer is what.

``describe(layer)`` turns one decoder layer of transformers into a :class:`LayerShape`, the facts that its forward and
backward depend on, or gives the reason why the layer is not known. To add a family: a line in ``FAMILIES`` if it has
the shape of one that is there; the probe of ``install.py`` refuses it if it computes something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILIES", "LayerShape", "blocks_of", "describe", "eps_of"]

_PLAIN = ("input_layernorm", None, "post_attention_layernorm", None)
_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

# Class of the decoder layer -> (offset of the norms' weights, norms before and after attention and MLP, softcap name).
FAMILIES: dict[str, tuple[float, tuple[str | None, ...], str | None]] = {
    "LlamaDecoderLayer": (0.0, _PLAIN, None),
    "MistralDecoderLayer": (0.0, _PLAIN, None),
    "Qwen2DecoderLayer": (0.0, _PLAIN, None),
    "Qwen3DecoderLayer": (0.0, _PLAIN, None),
    "Phi3DecoderLayer": (0.0, _PLAIN, None),
    "GemmaDecoderLayer": (1.0, _PLAIN, None),
    "Gemma2DecoderLayer": (1.0, _SANDWICH, "attn_logit_softcapping"),
    "Gemma3DecoderLayer": (1.0, _SANDWICH, None),
}

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# These pass the window of the config to every layer; the others keep it on the attention module, layer by layer.
_WINDOW_OF_CONFIG = ("MistralDecoderLayer", "Phi3DecoderLayer")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one decoder layer computes, apart from its weights.

    Attributes:
        heads, key_heads, head_dim: of the attention.
        norms: paths of the norms before attention, after it, before the MLP, after it; None where there is none.
        head_norms: paths of the norms of query and key heads, or None.
        offset: added to every norm's weight.
        eps: of the norms.
        groups: paths of the projections that read one input: q k v, o, gate up, down (or fused ones).
        activation, scale, window, softcap: of MLP and attention.
    """

    heads: int
    key_heads: int
    head_dim: int
    norms: tuple[str | None, ...]
    head_norms: tuple[str, str] | None
    offset: float
    eps: float
    groups: tuple[tuple[str, ...], ...]
    activation: str
    scale: float
    window: int | None
    softcap: float | None

    @property
    def has_post_norms(self) -> bool:
        """Whether the outputs of attention and MLP are normalized before they are added."""
        return self.norms[1] is not None


def blocks_of(layer: Any, shape: LayerShape) -> tuple[Any, ...]:
    """Return what tells whether the blocks of ``layer`` still compute what :func:`describe` read from them.

    Raises:
        AttributeError, KeyError: a block is gone.
    """
    parts, attention, mlp = layer._modules, layer.self_attn, layer.mlp
    norms = [parts[name] for name in shape.norms if name is not None]
    return (
        type(attention), type(mlp), type(getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)),
        attention.scaling, attention.head_dim, getattr(attention, "sliding_window", None),
        *(type(norm) for norm in norms), *(eps_of(norm) for norm in norms),
    )  # fmt: skip


def eps_of(norm: Any) -> float:
    """Return what a norm of transformers adds to the mean square."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def describe(layer: Any) -> LayerShape | str:
    """Return the shape of a decoder layer of transformers, or the reason why the engine does not know it."""
    name = type(layer).__name__
    if name not in FAMILIES or not type(layer).__module__.startswith("transformers."):
        return f"{name} is none of {', '.join(sorted(FAMILIES))}"
    if "forward" in vars(layer):
        return f"{name} has a forward of its own, from accelerate's hooks perhaps"
    offset, norms, softcap = FAMILIES[name]
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    if act not in _ACTIVATIONS:
        return f"{name} has the activation {act!r}; known are {', '.join(sorted(_ACTIVATIONS))}"
    if not (getattr(attention, "is_causal", True) and getattr(config, "is_causal", True)):
        return f"{name} attends in both directions"
    if getattr(config, "resid_pdrop", 0.0):
        return f"{name} drops whole residuals (resid_pdrop={config.resid_pdrop})"
    first_norm = layer.get_submodule(norms[0])
    has_head_norms = hasattr(attention, "q_norm")
    fused_qkv, fused_mlp = hasattr(attention, "qkv_proj"), hasattr(mlp, "gate_up_proj")
    return LayerShape(
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        norms=norms,
        head_norms=("self_attn.q_norm", "self_attn.k_norm") if has_head_norms else None,
        offset=offset,
        eps=eps_of(first_norm),
        groups=(
            ("self_attn.qkv_proj",) if fused_qkv else tuple(f"self_attn.{x}_proj" for x in "qkv"),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",) if fused_mlp else ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
        activation=_ACTIVATIONS[act],
        scale=float(attention.scaling),
        window=getattr(config if name in _WINDOW_OF_CONFIG else attention, "sliding_window", None),
        softcap=getattr(attention, softcap) if softcap else None,
    )
