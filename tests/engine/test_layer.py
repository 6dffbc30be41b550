"""The fused decoder layer against the reference in float64, under every policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.engine import support
from tests.engine.support import (
    FAMILIES,
    LINEARS,
    PHI3,
    POLICIES,
    assert_identical,
    assert_same,
    layer_inputs,
    results,
    truth,
)

from tunesmith.engine import reference
from tunesmith.engine.layer import FusedLayer, LayerCall
from tunesmith.engine.policies import Policy


def layer_of(family: str = "llama", *, index: int = 0, adapter: Any = None, full: bool = False, **changes: Any) -> Any:
    """Return one fused layer in float64; without ``adapter`` and ``full`` a LoRA of rank 3 is on every projection."""
    model = support.fused(family, adapter=None if full else (adapter or {}), **changes).double()
    return support.layers_of(model)[index]


def check(layer: Any, lengths: tuple[int, ...] = (5, 8), **inputs: Any) -> dict[str, torch.Tensor]:
    """Assert that output and gradients are the reference's, the same bytes under every policy; return them."""
    x, given = layer_inputs(layer, lengths, **inputs)
    exact = truth(layer, x, given)
    first = results(layer, x, given)
    assert_same(first, exact)
    for policy in POLICIES[1:]:
        assert_identical(results(layer, x, given, policy=policy), first)
    assert layer._engine.notes == []
    return first


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_adapters(family: str, index: int) -> None:
    found = check(layer_of(family, index=index))
    assert len(found) == 2 + 2 * (4 if family == "phi3" else 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fully_trained(family: str) -> None:
    layer = layer_of(family, full=True)
    found = check(layer)
    assert len(found) == 2 + len(list(layer.parameters()))


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (13,), (3, 1, 9, 2)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_lengths_of_documents(family: str, lengths: tuple[int, ...]) -> None:
    check(layer_of(family), lengths)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 17,
                   "attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 6}),
        ("qwen3", {"hidden_size": 27, "num_attention_heads": 3, "num_key_value_heads": 3, "attention_bias": True}),
        ("gemma2", {"hidden_size": 21, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 11}),
        ("phi3", {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 13, "sliding_window": 3}),
    ],
    ids=["odd sizes and biases", "no grouping", "odd sizes and norms per head", "odd sizes and post-norms", "fused"],
)  # fmt: skip
def test_shapes(family: str, changes: dict[str, Any]) -> None:
    check(layer_of(family, **changes))
    check(layer_of(family, full=True, **changes))


def test_part_of_a_head_may_be_rotated() -> None:
    check(layer_of("phi3"), rotated=0.5)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"]},
        {"target_modules": ["o_proj"]},
        {"target_modules": ["gate_proj", "down_proj"]},
        {"target_modules": ["k_proj", "up_proj"], "r": 1},
        {"rank_pattern": {"q_proj": 1, "down_proj": 7}, "alpha_pattern": {"v_proj": 40, "up_proj": 1}},
        {"use_rslora": True, "lora_alpha": 3},
        {"bias": "all"},
        {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    ],
    ids=lambda adapter: ", ".join(f"{key}={value}" for key, value in adapter.items()),
)
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_adapters(family: str, adapter: dict[str, Any]) -> None:
    check(layer_of(family, adapter=adapter))


@pytest.mark.parametrize("adapter", [{"target_modules": PHI3}, {"target_modules": ["qkv_proj"]}], ids=["all", "qkv"])
def test_adapters_on_fused_projections(adapter: dict[str, Any]) -> None:
    check(layer_of("phi3", adapter=adapter))


def test_layers_without_an_adapter_pass_the_gradient_through() -> None:
    """What ``layers_to_transform`` and ``finetune_last_n_layers`` leave out."""
    only_last = {"layers_to_transform": [1], "target_modules": [*LINEARS]}
    model = support.fused("llama", adapter=only_last).double()
    first, last = support.layers_of(model)
    assert check(first).keys() == {"output", "gradient of x"}
    assert len(check(last)) == 16


@pytest.mark.parametrize("trained", ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "layernorm", "q_norm"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("needs_x", [False, True], ids=["first layer", "inner layer"])
def test_only_what_is_trained_gets_a_gradient(family: str, trained: str, needs_x: bool) -> None:
    layer = layer_of(family, full=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(trained in name)
    x, given = layer_inputs(layer)
    x.requires_grad_(needs_x)
    exact = truth(layer, x, given)
    assert len(exact) == 1 + needs_x + sum(trained in name for name, _ in layer.named_parameters())
    for policy in POLICIES:
        assert_same(results(layer, x, given, policy=policy), exact)


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"])
def test_one_norm_alone(name: str) -> None:
    layer = layer_of("gemma2", full=True)
    for key, parameter in layer.named_parameters():
        parameter.requires_grad_(key.startswith(name))
    x, given = layer_inputs(layer)
    x.requires_grad_(False)
    for policy in POLICIES:
        assert_same(results(layer, x, given, policy=policy), truth(layer, x, given))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3"])
def test_dropout_is_that_of_the_drawn_mask(family: str) -> None:
    layer = layer_of(family, adapter={"lora_dropout": 0.4, "rank_pattern": {"q_proj": 1}})
    first = check(layer)
    x, given = layer_inputs(layer)
    assert_identical(results(layer, x, given), first)
    other = results(layer, x, given, seed=8)
    assert not torch.equal(other["output"], first["output"])
    layer.eval()
    assert_same(results(layer, x, given), truth(layer, x, given))


def test_dropout_masks_are_scaled_and_differ_between_projections() -> None:
    layer = layer_of("llama", adapter={"lora_dropout": 0.25}, hidden_size=64)
    x, given = layer_inputs(layer, (64,))
    masks = support.drawn_masks(support.fused_call(layer, x, given), x)
    assert len(masks) == 7
    for mask in masks.values():
        assert set(mask.unique().tolist()) == {0.0, 1 / 0.75}
        assert 0.2 < float((mask == 0).double().mean()) < 0.3
    assert not torch.equal(masks[0, 0], masks[0, 1])


def cut(layer: Any, rows: list[int]) -> tuple[LayerCall, torch.Tensor]:
    x, given = layer_inputs(layer)
    return replace(support.fused_call(layer, x, given), rows=torch.tensor(rows, dtype=torch.int64)), x


@pytest.mark.parametrize("rows", [[0, 3, 4, 11], [12], list(range(13)), []], ids=["some", "one", "all", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_only_the_rows_that_are_asked_for(family: str, rows: list[int]) -> None:
    layer = layer_of(family, adapter={"lora_dropout": 0.3})
    call, x = cut(layer, rows)
    exact = support._collect(layer, x, reference.decoder_layer(x[0], call, masks=support.drawn_masks(call, x)))
    assert len(exact["output"]) == len(rows)
    for policy in POLICIES:
        changed = replace(call, policy=policy)
        assert_same(support._collect(layer, x, FusedLayer.apply(x[0], changed, *changed.parameters)), exact)


def test_rows_give_the_gradients_of_the_whole_output() -> None:
    layer = layer_of("gemma3")
    call, x = cut(layer, [1, 2, 9])
    whole = replace(call, rows=None)
    picked = FusedLayer.apply(x[0], whole, *whole.parameters)[call.rows]
    assert_same(
        support._collect(layer, x, FusedLayer.apply(x[0], call, *call.parameters)), support._collect(layer, x, picked)
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("family", "full"), [("llama", True), ("qwen3", False), ("gemma2", False), ("gemma3", True)])
def test_gradcheck(family: str, full: bool, policy: Policy) -> None:
    """The whole layer against numerical derivatives: T = 13, two documents, grouped heads."""
    small = {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
             "intermediate_size": 3}  # fmt: skip
    layer = layer_of(family, full=full, adapter={"r": 1}, **small)
    x, given = layer_inputs(layer, (6, 7))
    layer._engine.set_policy(policy)
    trained = [p for p in layer.parameters() if p.requires_grad]
    # Entry by entry in two cases, along random directions in the others: all policies give the same bytes.
    is_fast = policy is not Policy.FULL or family not in ("llama", "gemma3")
    assert torch.autograd.gradcheck(
        lambda x, *_: layer(x, **given), (x, *trained), fast_mode=is_fast, check_undefined_grad=False
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_backward_twice_gives_the_same(family: str, policy: Policy) -> None:
    layer = layer_of(family, adapter={"lora_dropout": 0.3})
    x, given = layer_inputs(layer)
    layer._engine.set_policy(policy)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    out = layer(x, **given)
    first = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    # Another forward and backward in between writes over everything in scratch.
    y, others = layer_inputs(layer, (3, 9), seed=5)
    layer(y, **others).sum().backward()
    second = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_weight_that_changed_in_between_is_noticed(policy: Policy) -> None:
    layer = layer_of()
    x, given = layer_inputs(layer)
    layer._engine.set_policy(policy)
    out = layer(x, **given).sum()
    with torch.no_grad():
        next(p for p in layer.parameters() if p.requires_grad).add_(0.1)
    with pytest.raises(RuntimeError, match="changed in place between its forward and its backward"):
        out.backward()
    layer(x, **given).sum().backward()


def test_double_backward_is_refused() -> None:
    layer = layer_of()
    x, given = layer_inputs(layer)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(layer(x, **given).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_gradient_is_asked_for(policy: Policy) -> None:
    layer = layer_of()
    x, given = layer_inputs(layer)
    layer._engine.set_policy(policy)
    expected = layer(x, **given)
    with torch.no_grad():
        out = layer(x, **given)
    assert not out.requires_grad
    assert torch.equal(out, expected)


def test_evaluation_keeps_nothing() -> None:
    """With trainable parameters but no graph, nothing is put away."""
    layer = layer_of()
    x, given = layer_inputs(layer)
    layer._engine.set_policy(Policy.OFFLOAD)
    with torch.no_grad():
        layer(x, **given)
    assert layer._engine.store._file is None


def test_an_empty_token_axis() -> None:
    layer = layer_of()
    x, given = layer_inputs(layer, (0,))
    for policy in POLICIES:
        found = results(layer, x, given, policy=policy)
        assert found["output"].shape == (0, 32)
        assert not any(gradient.any() for name, gradient in found.items() if name != "output")
