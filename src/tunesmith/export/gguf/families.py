"""What llama.cpp calls the parts of a model, how it keeps them, and the numbers that it must be told.

Names come from ``gguf``'s own table. Three families keep weights otherwise than transformers:

- llama and mistral turn neighbouring rows of a head together, transformers row i and row i + E / 2: the rows of q and k
  are dealt out anew, (H, 2, E / 2) -> (H, E / 2, 2), and so are their biases;
- gemma's norms multiply by 1 + w, llama.cpp's by w: one is added.

What llama.cpp has no place for is refused here, by name: a model that loads and answers otherwise is the worst outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
import numpy as np
import torch

from tunesmith.core.errors import ExportError
from tunesmith.export.gguf.rope import rope_factors, rope_values
from tunesmith.export.weights import merged_weights

__all__ = ["FAMILIES", "Family", "Tensor", "arranged", "family_of", "model_values", "tensor_name", "tensors_of"]


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp knows a family.

    Attributes:
        arch: its name of the architecture.
        permutes: whether rows of q and k are dealt out anew.
        shifts_norms: whether one is added to norms.
        is_tied: whether it has no place for an output head beside the embedding.
        activation: the only one that it computes.
        period: every how many layers one sees everything, where the others have a window.
    """

    arch: str
    permutes: bool = False
    shifts_norms: bool = False
    is_tied: bool = False
    activation: str = "silu"
    period: int | None = None


_GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": Family("llama", permutes=True),
    "mistral": Family("llama", permutes=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", shifts_norms=True, is_tied=True, activation=_GELU),
    "gemma2": Family("gemma2", shifts_norms=True, is_tied=True, activation=_GELU, period=2),
    "gemma3_text": Family("gemma3", shifts_norms=True, activation=_GELU, period=6),
    "phi3": Family("phi3"),
}
"""``config.model_type`` -> family."""

# llama.cpp tells the largest gemmas by their layers, and scales their attention by the width and not by the head.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a GGUF file.

    Attributes:
        name: llama.cpp's.
        shape: rows first, as in PyTorch.
        make: returns it, float32 and arranged as llama.cpp wants it.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def family_of(config: Any) -> Family:
    """Return the family of a config.

    Raises:
        ExportError: llama.cpp or this converter does not know it, or computes something of it in another way.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ExportError(
            f"{config.model_type} models are not written as GGUF. Supported are {', '.join(FAMILIES)}. "
            "save_pretrained_merged writes a folder that other converters read."
        )
    for name in ("hidden_activation", "hidden_act"):
        given = getattr(config, name, None)
        if given is not None and given != family.activation:
            raise ExportError(f"llama.cpp computes {family.arch} with {family.activation}, and this model has {given}.")
    scaled = getattr(config, "query_pre_attn_scalar", None)
    if scaled is not None:
        by_width = config.num_hidden_layers == _SCALED_BY_WIDTH[family.arch]
        wanted = config.hidden_size // config.num_attention_heads if by_width else config.head_dim
        if scaled != wanted:
            raise ExportError(
                f"llama.cpp scales the attention of this {family.arch} by {wanted}, and its query_pre_attn_scalar is "
                f"{scaled}: it would answer otherwise."
            )
    if getattr(config, "use_bidirectional_attention", None):
        raise ExportError("use_bidirectional_attention: llama.cpp would answer with causal attention.")
    return family


def model_values(config: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the values that llama.cpp reads, without the prefix of the architecture, and what the user should know."""
    family = family_of(config)
    head, notes = head_size(config), []
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        **rope_values(config, family.arch, head),
    }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            values[name] = float(getattr(config, name))
    window = getattr(config, "sliding_window", None)
    windowed = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]
    if family.period is not None:
        values["attention.sliding_window"] = window
        if windowed != [(index + 1) % family.period != 0 for index in range(len(windowed))]:
            values["attention.sliding_window_pattern"] = windowed
    elif window and (any(windowed) or not windowed) and window < config.max_position_embeddings:
        values["context_length"] = window
        notes.append(
            f"llama.cpp has no sliding window for {family.arch}: beyond {window} tokens it would answer otherwise, so "
            f"context_length is {window}"
        )
    return values, notes


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@cache
def _names(arch: str, layers: int) -> gguf.TensorNameMap:
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[arch], layers)


def tensor_name(config: Any, name: str) -> str:
    """Return llama.cpp's name of the weight ``name`` of the untuned model.

    Raises:
        ExportError: it has none, or no place for it.
    """
    family = family_of(config)
    found = _names(family.arch, config.num_hidden_layers).get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None or (family.is_tied and found == "output.weight"):
        raise ExportError(f"llama.cpp has no place for the weight {name} in {family.arch} models.")
    return found


def arranged(config: Any, name: str, weight: np.ndarray) -> np.ndarray:
    """Return ``weight`` of the untuned model's ``name`` as llama.cpp keeps it; leading axis: rows."""
    family = family_of(config)
    module = name.split(".")[-2]
    if family.permutes and module in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    if family.shifts_norms and "norm" in module:
        return weight + 1
    return weight


def tensors_of(model: Any, shares: Mapping[str, float]) -> Iterator[Tensor]:
    """Yield the tensors of the GGUF file of ``model`` with the adapters of ``shares`` merged."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    for name, factors in rope_factors(config, family_of(config).arch).items():
        yield Tensor(name, factors.shape, lambda factors=factors: factors)
    for weight in merged_weights(model, shares):
        yield Tensor(tensor_name(config, weight.name), weight.shape, _maker(config, weight.name, weight.make))


def _maker(config: Any, name: str, make: Callable[[], torch.Tensor]) -> Callable[[], np.ndarray]:
    def made() -> np.ndarray:
        return arranged(config, name, make().detach().to("cpu", torch.float32).numpy())

    return made
