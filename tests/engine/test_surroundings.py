"""What is done to a model from outside: second derivatives, hooks, other blocks, shared weights, pickle ..."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from tests.engine.support import FAMILIES, fused, plain
from torch import nn
from transformers import DynamicCache

from tunesmith import FastLanguageModel
from tunesmith.engine.install import engine_of

IDS = torch.randint(0, 331, (2, 11), generator=torch.Generator().manual_seed(0))


def loss_of(model: Any, **how: Any) -> torch.Tensor:
    return model(IDS, labels=IDS, use_cache=False, **how).loss


@pytest.mark.parametrize("adapter", [None, {}], ids=["all weights", "adapter"])
def test_second_derivatives_are_refused_and_not_zero(adapter: Any) -> None:
    model = fused(adapter=adapter)
    weights = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match=r"no second derivatives \(create_graph=True\)"):
        torch.autograd.grad(loss_of(model), weights, create_graph=True)
    torch.autograd.grad(loss_of(model), weights)


def with_our_adapter(model: Any) -> Any:
    return FastLanguageModel.get_peft_model(model, r=3, use_gradient_checkpointing=False)


def test_offloaded_weights_are_read_where_accelerate_has_them() -> None:
    from accelerate import cpu_offload

    model = with_our_adapter(fused()).eval()
    with torch.no_grad():
        before = model(IDS, use_cache=False).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.allclose(model(IDS, use_cache=False).logits, before, atol=1e-4)


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_hooks_on_parts_of_an_adapter_run(part: str) -> None:
    model = with_our_adapter(fused())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    calls: list[int] = []
    layer.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    loss_of(model).backward()
    model.eval().generate(input_ids=IDS[:1], max_new_tokens=1)
    assert len(calls) == 2


def test_hooks_of_all_modules_run() -> None:
    counts = []
    for model in (fused(), plain()):
        calls: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, *_, calls=calls: calls.append(type(m).__name__)
        )
        try:
            loss_of(model)
        finally:
            handle.remove()
        counts.append(sorted(calls))
    assert counts[0] == counts[1]


class _Half(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) / 2


def _act(layer: Any) -> None:
    layer.mlp.act_fn = nn.ReLU()


def _mlp(layer: Any) -> None:
    layer.mlp = _Half(layer.mlp)


def _eps(layer: Any) -> None:
    layer.input_layernorm.variance_epsilon = 1.0


def _scaling(layer: Any) -> None:
    layer.self_attn.scaling = 0.01


@pytest.mark.parametrize("change", [_act, _mlp, _eps, _scaling])
def test_blocks_that_are_changed_later_are_followed(change: Any) -> None:
    ours, theirs = fused(), plain()
    for model in (ours, theirs):
        for layer in model.model.layers:
            change(layer)
    assert torch.allclose(loss_of(ours), loss_of(theirs), atol=1e-5)
    assert engine_of(ours).notes == ["a block inside the layer was changed after it was loaded"]


def test_adaption_prompts() -> None:
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    losses = [loss_of(get_peft_model(model, config)) for model in (fused(), plain())]
    assert torch.allclose(*losses, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"), [("self_attn.k_proj", "self_attn.v_proj"), ("input_layernorm", "post_attention_layernorm")]
)
def test_a_weight_that_stands_twice_gets_the_sum(first: str, second: str) -> None:
    grads = []
    for model in (fused(), plain()):
        layer = model.model.layers[0]
        layer.get_submodule(second).weight = layer.get_submodule(first).weight
        loss_of(model).backward()
        grads.append(layer.get_submodule(first).weight.grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


def test_an_optimizer_over_one_flat_buffer_trains_all_weights() -> None:
    losses = []
    for model in (plain(), fused()):
        weights = list(model.parameters())
        flat = torch.cat([weight.detach().flatten() for weight in weights]).requires_grad_()
        flat.grad, start = torch.zeros_like(flat), 0
        for weight in weights:
            size = weight.numel()
            weight.data = flat.data[start : start + size].view_as(weight)
            weight.grad = flat.grad[start : start + size].view_as(weight)
            start += size
        optimizer = torch.optim.SGD([flat], lr=0.05)
        for _ in range(4):
            flat.grad.zero_()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_that_jump_cut_nothing_beside_a_cache(family: str) -> None:
    model, positions, cache, parts = fused(family).eval(), 2 * torch.arange(11)[None], None, []
    with torch.no_grad():
        for at in range(11):
            found = model(IDS[:1, at : at + 1], position_ids=positions[:, at : at + 1], past_key_values=cache)
            cache = found.past_key_values
            parts.append(found.logits)
        whole = model(IDS[:1], position_ids=positions).logits
    assert torch.allclose(whole, torch.cat(parts, 1), atol=1e-4)


def test_documents_are_still_apart_beside_a_cache() -> None:
    model = fused().eval()
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    with torch.no_grad():
        joined = model(IDS[:1], position_ids=positions).logits[:, 6:]
        assert torch.allclose(joined, model(IDS[:1, 6:]).logits, atol=1e-5)


def test_what_ran_in_inference_mode_trains_later() -> None:
    model = with_our_adapter(fused())
    model.to(torch.float64).to(torch.float32)  # so that weights are stacked anew inside
    with torch.inference_mode():
        loss_of(model)
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.requires_grad_(True)


def test_compiled_models_compute_the_same() -> None:
    model = fused(adapter={})
    expected = loss_of(model)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager")(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, grads[name], rtol=1e-3, atol=1e-6), name


def test_checkpointing_beside_a_cache_that_is_handed_in() -> None:
    losses = []
    for base in (fused(), plain()):
        model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], use_dora=True)).train()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        loss = model(IDS, labels=IDS, past_key_values=DynamicCache(), use_cache=False).loss
        loss.backward()
        losses.append(loss)
    assert torch.allclose(*losses, atol=1e-5)


@pytest.mark.parametrize("adapter", [None, {}], ids=["base", "adapter"])
def test_a_pickled_model_computes_the_same(adapter: Any) -> None:
    model, file = fused(adapter=adapter), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert engine_of(again) is not engine_of(model)
    losses = [loss_of(each) for each in (model, again)]
    assert torch.equal(*losses)
    losses[1].backward()
    assert engine_of(again).notes == []


def test_layers_that_are_added_are_computed_whole() -> None:
    losses = []
    for model in (fused(), plain()):
        layers = model.model.layers
        layers.append(copy.deepcopy(layers[1]))
        layers[2].self_attn.layer_idx, model.config.num_hidden_layers = 2, 3
        losses.append(loss_of(model))
    assert torch.allclose(*losses, atol=1e-5)


def test_a_dropout_of_ones_own_counts() -> None:
    losses = []
    for model in (fused(adapter={}), plain(adapter={})):
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = nn.Hardtanh(-0.1, 0.1)
        losses.append(loss_of(model))
    assert torch.allclose(*losses, atol=1e-5)
