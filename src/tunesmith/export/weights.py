"""A tuned model as plain weights, one at a time: base plus adapters, under the names of the untuned model.

    W' = W + sum over adapters of share * scale * B A            LoRA, rsLoRA, PiSSA, OLoRA, LoftQ
    W' = m / ||W + scale B A|| * (W + scale B A), row by row     DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5)

computed in float32 when it is asked for. Nothing of the model is changed, and one weight is made at a time. Modules
and rows of tokens that train whole stand in their place; weights of 4 and 8 bits are what they stand for, or, where
``originals`` are given, what they were rounded from.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from tunesmith.core.errors import AdapterError
from tunesmith.engine.read import is_quantized, read_quantized
from tunesmith.ops.quantized import dequantize

__all__ = ["MergedWeight", "adapter_shares", "check_mergeable", "merged_weights", "mixed", "refuse_parted"]


@dataclass(frozen=True, slots=True)
class MergedWeight:
    """One weight of the merged model.

    Attributes:
        name: as in the state dict of the untuned model.
        shape: of the tensor.
        is_float: whether it is to be cast to the dtype of the export.
        make: returns it, float32 where something was added or written out, else as it is in memory.
        is_quantized: whether the model holds it in fewer bits.
    """

    name: str
    shape: tuple[int, ...]
    is_float: bool
    make: Callable[[], torch.Tensor]
    is_quantized: bool = False


def adapter_shares(model: Any, wanted: Mapping[str, float] | None) -> dict[str, float]:
    """Return the adapters to merge and the share of each: those that are asked for, or the active ones in full.

    Raises:
        AdapterError: an adapter that is not there, or several of which one cannot be added to others.
    """
    known = getattr(model, "peft_config", {})
    if wanted is None:
        wanted = dict.fromkeys(model.active_adapters, 1.0) if known else {}
    for name in wanted:
        if name not in known:
            raise AdapterError(f"adapter {name!r} is not on this model. There are: {', '.join(known) or 'none'}.")
    kinds = {name: known[name] for name in wanted}
    if len(kinds) > 1 and any(
        kind.use_dora or kind.modules_to_save or kind.trainable_token_indices for kind in kinds.values()
    ):
        raise AdapterError("adapters with DoRA or whole modules cannot be added to others. Merge one at a time.")
    for name, kind in kinds.items():
        check_mergeable(name, kind)
        if kind.use_dora and wanted[name] != 1:
            raise AdapterError(f"adapter {name!r} is a DoRA: it is merged in full, not by {wanted[name]}.")
        refuse_parted(name, kind, model)
    return dict(wanted)


def refuse_parted(name: str, config: Any, model: Any) -> None:
    """Refuse an adapter that makes two of the one tensor of embedding and output head.

    Raises: AdapterError.
    """
    base = model.get_base_model()
    if not base.config.get_text_config().tie_word_embeddings or config.ensure_weight_tying:
        return
    ends = {"embedding": base.get_input_embeddings(), "output head": base.get_output_embeddings()}
    adapted = [end for end, layer in ends.items() if isinstance(layer, LoraLayer) and name in _places(layer)]
    if adapted:
        raise AdapterError(
            f"adapter {name!r} changes the {' and the '.join(adapted)}, and embedding and output head of this model "
            "are one tensor, which no export parts. Make the adapter without, or with ensure_weight_tying=True."
        )


def check_mergeable(name: str, config: Any) -> None:
    """Refuse the kinds of LoRA that can be trained and never merged.

    Raises:
        AdapterError: ``config`` of the adapter ``name`` is of one.
    """
    for reason in ("lora_bias", "alora_invocation_tokens", "layer_replication"):
        if getattr(config, reason, None):
            raise AdapterError(
                f"adapter {name!r} has {reason}, which no plain weight can hold: it is not merged. Make the adapter "
                f"without {reason}."
            )


@contextmanager
def mixed(model: Any, shares: Mapping[str, float]) -> Generator[None]:
    """Let ``model`` answer with the adapters of ``shares``, each by its share, for the block."""
    active = list(model.active_adapters) if shares else []
    if dict(shares) == dict.fromkeys(active, 1.0):
        yield
        return
    scalings = [module.scaling for module in model.modules() if isinstance(module, LoraLayer)]
    before = [(scaling, name, scaling[name]) for scaling in scalings for name in shares if name in scaling]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.base_model.set_adapter(list(shares))
        for scaling, name, scale in before:
            scaling[name] = scale * shares[name]
        yield
    finally:
        for scaling, name, scale in before:
            scaling[name] = scale
        model.base_model.set_adapter(active)
        for parameter, was_trainable in trainable:  # PEFT trains what it has just made active
            parameter.requires_grad_(was_trainable)


def merged_weights(
    model: Any, shares: Mapping[str, float], originals: Mapping[str, Callable[[], torch.Tensor]] | None = None
) -> Iterator[MergedWeight]:
    """Yield the weights of ``model`` (a PEFT model or a plain one) with the adapters of ``shares`` merged.

    Tied weights come once, under the name of the first. ``originals`` gives weights of a quantized base by name.

    Raises:
        AdapterError: a layer carries something that cannot be merged.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen: set[int] = set()
    for weight, source in _walk(base, "", shares, originals or {}):
        if id(source) not in seen:
            seen.add(id(source))
            yield weight


_Found = Iterator[tuple[MergedWeight, torch.Tensor]]


def _walk(module: Any, prefix: str, shares: Mapping[str, float], originals: Mapping[str, Any]) -> _Found:
    """Yield the weights below ``module`` and the tensors that they are made of."""
    if isinstance(module, ModulesToSaveWrapper):
        active = [name for name in module.active_adapters if name in module.modules_to_save and name in shares]
        module = module.modules_to_save[active[0]] if active else module.original_module
        yield from _walk(module, prefix, shares, originals)
    elif isinstance(module, TrainableTokensWrapper):
        yield from _with_tokens(module.token_adapter, prefix, shares, originals)
    elif isinstance(module, LoraLayer):
        yield from _adapted(module, prefix, shares, originals)
    else:
        yield from _own(module, prefix, originals)
        for name, child in module.named_children():
            yield from _walk(child, f"{prefix}{name}.", shares, originals)


def _with_tokens(layer: Any, prefix: str, shares: Mapping[str, float], originals: Mapping[str, Any]) -> _Found:
    """Yield the weights of an embedding or head of which some rows were trained whole."""
    trained = [name for name in shares if name in layer.trainable_tokens_delta and not layer.merged]
    for weight, source in _walk(layer.base_layer, prefix, shares, originals):
        for name in trained if weight.name == f"{prefix}weight" else ():
            rows, values = layer.token_indices[name], layer.trainable_tokens_delta[name]
            weight = replace(weight, make=_replacing(weight.make, rows, values))
        yield weight, source


def _replacing(make: Callable[[], torch.Tensor], rows: Any, values: torch.Tensor) -> Callable[[], torch.Tensor]:
    @torch.no_grad()
    def replaced() -> torch.Tensor:
        weight = make()
        return weight.index_copy(0, torch.as_tensor(rows, device=weight.device), values.to(weight))

    return replaced


def _own(module: Any, prefix: str, originals: Mapping[str, Any]) -> _Found:
    """Yield the parameters and saved buffers of one module, without its children."""
    if is_quantized(module):
        name = f"{prefix}weight"
        shape = (module.out_features, module.in_features)
        yield MergedWeight(name, shape, True, originals.get(name) or _written_out(module), True), module.weight
        if module.bias is not None:
            yield _plain(f"{prefix}bias", module.bias)
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield _plain(prefix + name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield _plain(prefix + name, buffer)


def _plain(name: str, tensor: torch.Tensor) -> tuple[MergedWeight, torch.Tensor]:
    return MergedWeight(name, tuple(tensor.shape), tensor.is_floating_point(), tensor.detach), tensor


def _written_out(module: Any) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        found = read_quantized(module)
        if isinstance(found, str):
            raise AdapterError(f"a quantized layer cannot be merged: {found}.")
        return dequantize(found)

    return make


def _adapted(layer: Any, prefix: str, shares: Mapping[str, float], originals: Mapping[str, Any]) -> _Found:
    """Yield the weights of a layer with LoRA, merged."""
    merging = {name: share for name, share in shares.items() if name in _places(layer)}
    adapted = "weight" if not hasattr(layer, "parameter_name") else layer.parameter_name
    inner = layer.base_layer
    below = _walk(inner, prefix, shares, originals)  # itself adapted where each of several parameters is
    for weight, source in below:
        if weight.name == prefix + adapted and merging and not layer.merged:
            yield replace(weight, is_float=True, make=_merging(layer, merging, weight.make)), source
        else:
            yield weight, source


def _places(layer: Any) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}


def _merging(layer: Any, shares: Mapping[str, float], make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    @torch.no_grad()
    def merged() -> torch.Tensor:
        weight = make().to(torch.float32, copy=True)
        for name, share in shares.items():
            variant = layer.lora_variant.get(name) if hasattr(layer, "lora_variant") else None
            delta = layer.get_delta_weight(name).float()
            # An original is read from its file: it lies on the CPU, wherever the adapter is.
            weight = weight.to(delta.device).add_(delta, alpha=share)
            if variant is not None:
                weight = _with_magnitude(layer, name, weight)
        return weight

    return merged


def _with_magnitude(layer: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the rows of ``weight`` at the lengths that DoRA has learned."""
    held = layer.lora_magnitude_vector[name]
    if type(held) is not DoraLinearLayer or getattr(layer, "fan_in_fan_out", False):
        raise AdapterError(f"DoRA on a {type(layer.get_base_layer()).__name__} is not merged. Save the adapter.")
    lengths = torch.linalg.norm(weight, dim=1)
    return weight.mul_((held.weight.float() / lengths)[:, None])
