"""Models with fused layers, one layer of them with inputs, and the truth for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests import tiny

from tunesmith.engine import reference
from tunesmith.engine.attention import use_document_attention
from tunesmith.engine.install import install
from tunesmith.engine.layer import FusedLayer, LayerCall
from tunesmith.engine.policies import Policy
from tunesmith.ops.lora_linear import cpu as lora

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
"""Families whose decoder layers the engine knows."""

POLICIES = list(Policy)

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PHI3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def fused(family: str = "llama", *, seed: int = 0, adapter: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """Return a tiny model with fused layers, inside PEFT where ``adapter`` gives the arguments of its config."""
    model = tiny.tiny_model(family, seed=seed, **changes)
    assert use_document_attention(model) is None
    engine = install(model)
    assert not engine.plan.unknown, str(engine.plan)
    return model if adapter is None else adapted(model, seed=seed, **adapter)


def plain(family: str = "llama", *, seed: int = 0, adapter: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """Return the same model as transformers and PEFT wrote it; eager attention where SDPA has no softcap."""
    model = tiny.tiny_model(family, seed=seed, **changes)
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    return model if adapter is None else adapted(model, seed=seed, **adapter)


def adapted(model: Any, *, seed: int = 0, name: str = "default", **arguments: Any) -> Any:
    """Put a LoRA adapter on ``model`` whose A and B are drawn, so that no gradient is zero."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **arguments})
    torch.manual_seed(seed)
    if hasattr(model, "peft_config"):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    draw(model, seed, only=f".{name}.")
    return model.train()


def draw(model: Any, seed: int, *, only: str = "lora_") -> None:
    """Fill every weight of an adapter with numbers of its own."""
    generator = torch.Generator().manual_seed(seed + 1)
    for key, parameter in model.named_parameters():
        if "lora_" in key and only in key and parameter.ndim == 2:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: Any) -> Any:
    return base_of(model).get_decoder().layers


def layer_inputs(
    layer: Any, lengths: tuple[int, ...] = (5, 8), *, seed: int = 3, rotated: float = 1.0
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return hidden states (1, T, D) and the keywords with which the model calls its layer."""
    weight = layer.get_submodule(layer._shape.norms[0]).weight
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.dtype)

    tokens, half = sum(lengths), int(layer._shape.head_dim * rotated) // 2
    angle = drawn(1, tokens, half).repeat(1, 1, 2)
    ends = [sum(lengths[: count + 1]) for count in range(len(lengths))]
    return drawn(1, tokens, weight.shape[0]).requires_grad_(), {
        "position_embeddings": (angle.cos(), angle.sin()),
        "cu_seq_lens_q": torch.tensor([0, *ends], dtype=torch.int32),
        "attention_mask": None,
    }


def fused_call(layer: Any, x: torch.Tensor, given: dict[str, Any], *, seed: int = 7) -> LayerCall:
    """Return the call with which ``layer`` would compute; it draws the dropout of ``seed``."""
    torch.manual_seed(seed)
    call = layer._call(x, (), given)
    assert isinstance(call, LayerCall), f"not fused: {call}"
    return call


def results(
    layer: Any, x: torch.Tensor, given: dict[str, Any], *, policy: Policy = Policy.NONE, seed: int = 7
) -> dict[str, torch.Tensor]:
    """Return output and gradients of the fused layer under a fixed cotangent."""
    layer._engine.set_policy(policy)
    torch.manual_seed(seed)
    out = layer(x, **given)
    return _collect(layer, x, out[0])


def truth(layer: Any, x: torch.Tensor, given: dict[str, Any], *, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return output and gradients of the reference, with the dropout masks that the layer draws."""
    call = fused_call(layer, x, given, seed=seed)
    out = reference.decoder_layer(x.flatten(0, -2), call, masks=drawn_masks(call, x))
    return _collect(layer, x, out)


def drawn_masks(call: LayerCall, x: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    masks: dict[tuple[int, int], torch.Tensor] = {}
    for number, group in enumerate(call.groups):
        count = len(call.rows) if call.rows is not None and number else x.shape[-2]
        for index, p in enumerate(group.projections):
            if p.dropout:
                like = x.new_empty(count, p.weight.shape[1])
                masks[number, index] = lora._mask(like, p, group.seeds, index)
    return masks


def _collect(layer: Any, x: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    generator = torch.Generator().manual_seed(11)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    gradients = {f"gradient of {name}": grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    return {"output": out.detach(), **gradients}


@contextmanager
def counted() -> Iterator[list[LayerCall]]:
    """Yield the list of all calls of fused layers inside the block."""
    calls: list[LayerCall] = []
    original = FusedLayer.forward

    def forward(ctx: Any, x: torch.Tensor, call: LayerCall, *parameters: torch.Tensor) -> torch.Tensor:
        calls.append(call)
        return original(ctx, x, call, *parameters)

    FusedLayer.forward = staticmethod(forward)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        FusedLayer.forward = staticmethod(original)  # type: ignore[method-assign]


def batch(*lengths: int, seed: int = 2) -> dict[str, Any]:
    """Return documents joined on one axis, as a trainer gives them to the model; labels train every second token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(tiny.VOCABULARY, (1, sum(lengths)), generator=generator)
    labels = ids.clone()
    labels[:, ::2] = -100
    starts = [sum(lengths[:count]) for count in range(len(lengths))]
    labels[:, starts] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}


def step(model: Any, given: Mapping[str, Any] | None = None, *, fused: bool | None = None) -> dict[str, torch.Tensor]:
    """Return loss, logits and gradients of one training step; ``fused`` says which path must have computed it."""
    model.zero_grad(set_to_none=True)
    with counted() as calls:
        output = model(**(batch(7, 1, 9) if given is None else given))
        output.loss.backward()
    assert fused is None or len(calls) == (2 if fused else 0)
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()}
    return found | {
        f"gradient of {name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_close(ours: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> None:
    """Assert what two float32 paths owe each other: the loss to 1e-5, each gradient to 1e-4 of its norm."""
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        error, size = float((ours[name] - value).norm()), float(value.norm())
        assert error <= (1e-5 if name == "loss" else 1e-4) * size + 1e-9, f"{name}: {error:.3g} of {size:.3g}"


def assert_same(ours: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor], relative: float = 1e-9) -> None:
    """Assert the same names, and values that differ by no more than ``relative`` to the largest of each tensor."""
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert ours[name].shape == value.shape, name
        if value.numel():
            error, largest = float((ours[name] - value).abs().max()), float(value.abs().max())
            assert error <= relative * largest, f"{name}: {error:.3g} of {largest:.3g}"


def assert_identical(ours: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> None:
    """Assert the same names and the same bytes."""
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert torch.equal(ours[name], value), f"{name}: {(ours[name] - value).abs().max():.3g}"
