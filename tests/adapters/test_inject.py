from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.training.support import trainable

from tunesmith import FastLanguageModel
from tunesmith.adapters.inject import inject_adapter, set_checkpointing, trainable_share
from tunesmith.adapters.settings import AdapterSettings
from tunesmith.core.errors import AdapterError, OutputError, SettingsError
from tunesmith.engine.attention import use_document_attention
from tunesmith.engine.install import install
from tunesmith.engine.policies import Policy
from tunesmith.models.load import facts_of


def adapt(model: Any = None, **arguments: Any) -> Any:
    model = tiny.tiny_model("llama") if model is None else model
    return FastLanguageModel.get_peft_model(model, **{"r": 4, "use_gradient_checkpointing": False, **arguments})


def test_the_same_seed_starts_from_the_same_adapter() -> None:
    torch.manual_seed(1)
    first = trainable(adapt())
    torch.manual_seed(2)
    again, other = trainable(adapt()), trainable(adapt(random_state=1))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_random_states_are_given_back() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    adapt(tiny.tiny_model("llama"))
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_adapter_weights_are_float32_on_any_base() -> None:
    model = adapt(tiny.tiny_model("llama").bfloat16())
    assert {weight.dtype for weight in trainable(model).values()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_new_adapter_changes_no_output() -> None:
    model = tiny.tiny_model("llama").eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(adapt(model).eval()(ids).logits, before)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 4), (True, 32 / 2)])
def test_the_scale_of_the_adapter(rslora: bool, scale: float) -> None:
    model = adapt(lora_alpha=32, use_rslora=rslora)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scale


def names_of(model: Any) -> set[str]:
    return {name.partition(".lora_")[0].removeprefix("base_model.model.model.layers.") for name in trainable(model)}


def test_layers_are_chosen() -> None:
    assert {name[0] for name in names_of(adapt(layers_to_transform=[1]))} == {"1"}
    assert {name[0] for name in names_of(adapt(layers_to_transform=0))} == {"0"}
    assert {name[0] for name in names_of(adapt(finetune_last_n_layers=1))} == {"1"}
    assert names_of(adapt(finetune_last_n_layers=2)) == names_of(adapt())


def test_ranks_and_exceptions_by_name() -> None:
    model = adapt(rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 6.0}, exclude_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0]
    assert (layer.mlp.down_proj.r["default"], layer.mlp.up_proj.r["default"]) == (2, 4)
    assert layer.mlp.down_proj.scaling["default"] == 3.0
    assert not any("q_proj" in name for name in names_of(model))
    assert (
        names_of(adapt(exclude_modules="q_proj")) == names_of(adapt(exclude_modules=r".*\.q_proj")) == names_of(model)
    )
    every = {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "rank_pattern": {r"layers\.1\..*_proj": 2}}
    assert names_of(adapt(**every)) == names_of(adapt())


@pytest.mark.parametrize(("arguments", "part"), [({"use_dora": True}, "lora_magnitude"), ({"bias": "all"}, "bias"),
                                                 ({"modules_to_save": ["norm"]}, "modules_to_save")])  # fmt: skip
def test_further_weights_that_train(arguments: dict[str, Any], part: str) -> None:
    assert any(part in name for name in trainable(adapt(tiny.tiny_model("qwen2"), **arguments)))


@pytest.mark.parametrize("start", ["pisa", "pissa_niter_", "pissa_niter_x", 3, "Gauss"])
def test_starts_that_nobody_knows(start: Any) -> None:
    with pytest.raises(SettingsError, match=f"init_lora_weights={start!r} is not known"):
        adapt(init_lora_weights=start)


@pytest.mark.parametrize(("init", "b_is_zero"), [(True, True), ("gaussian", True), (False, False), ("true", True)])
def test_starts(init: Any, b_is_zero: bool) -> None:
    for name, weight in trainable(adapt(init_lora_weights=init)).items():
        assert (not weight.any()) == (b_is_zero and "lora_B" in name), name


def test_the_same_call_again_returns_the_model() -> None:
    model = adapt()
    assert adapt(model) is model
    assert adapt(model, target_modules="all-linear") is model, "the same layers by another name"
    assert not facts_of(model).checkpointing
    assert facts_of(adapt(model, use_gradient_checkpointing=True)).checkpointing


def test_the_order_of_layers_is_no_difference() -> None:
    model = adapt(layers_to_transform=[1, 0])
    assert adapt(model, layers_to_transform=[0, 1]) is model


def test_the_base_below_an_adapter_is_not_adapted_again() -> None:
    base = tiny.tiny_model()
    model = FastLanguageModel.get_peft_model(base, r=4)
    with pytest.raises(AdapterError, match="Go on with the model that get_peft_model returned"):
        FastLanguageModel.get_peft_model(base, r=4)
    again = FastLanguageModel.get_peft_model(model.unload(), r=8)
    assert again.peft_config["default"].r == 8


def test_another_call_is_refused_with_the_difference() -> None:
    model = adapt()
    with pytest.raises(AdapterError, match=r"already carries an adapter with other settings \(r: 4 -> 8\)"):
        adapt(model, r=8)
    with pytest.raises(AdapterError, match=r"target_modules: \['down_proj', .* -> \['q_proj'\]"):
        adapt(model, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="random_state: 3407 -> 1"):
        adapt(model, random_state=1)
    with pytest.raises(AdapterError, match=r"layers_to_transform: None -> \[1\]|finetune_last_n_layers"):
        adapt(model, finetune_last_n_layers=1)


def test_an_adapter_of_someone_else_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    foreign = get_peft_model(tiny.tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"the model already carries an adapter. Train it as it is"):
        adapt(foreign)


def test_a_model_of_someone_else_is_adapted_and_remembered() -> None:
    model = adapt(tiny.tiny_model("llama"))
    facts = facts_of(model)
    assert facts is facts_of(model)
    assert facts.dtype.reason == "as loaded by the caller"
    assert facts.window == tiny.WINDOW
    assert facts.adapter is not None and facts.adapter["r"] == 4


def test_trainable_share_counts_shared_tensors_once() -> None:
    model = tiny.tiny_model("qwen3")
    total = sum(parameter.numel() for parameter in set(model.parameters()))
    assert model.config.tie_word_embeddings
    assert trainable_share(model.requires_grad_(False)) == (0, total)
    trains, everything = trainable_share(adapt(model))
    assert everything == total + trains > total


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers_to_transform": [0, 2]}, AdapterError, r"layers_to_transform \[2\]: the model has layers 0 to 1"),
        ({"finetune_last_n_layers": 3}, AdapterError, "finetune_last_n_layers=3, but the model has 2 layers"),
        ({"finetune_last_n_layers": 1, "layers_to_transform": [0]}, AdapterError, "both choose layers"),
        ({"modules_to_save": ["lm_haed"]}, AdapterError, "'lm_haed' is no module .*Did you mean 'lm_head'"),
        ({"exclude_modules": ".*"}, AdapterError, "the adapter does not fit LlamaForCausalLM"),
        ({"r": 0}, SettingsError, "get_peft_model: r = 0"),
        ({"r": True, "lora_dropout": 1.0, "bias": "some"}, SettingsError, "get_peft_model: 3 problems"),
        ({"use_gradient_checkpointing": "always"}, SettingsError, "allowed are True, False, 'selective'"),
        ({"target_modules": ".*q_proj", "finetune_last_n_layers": 1}, AdapterError, "does not fit .*layers_to_trans"),
        ({"layers_pattern": "layers"}, AdapterError, "`layers_to_transform` must also be specified"),
        ({"layers_pattern": "[", "layers_to_transform": [0]}, AdapterError, "the adapter does not fit"),
        ({"rank_pattern": {"[": 2}}, AdapterError, r"rank_pattern '\[' is no regular expression"),
        ({"exclude_modules": "["}, AdapterError, r"exclude_modules '\[' is no regular expression"),
        ({"rank_pattern": {"down_porj": 2}}, AdapterError, "rank_pattern 'down_porj' .*Did you mean 'down_proj'"),
        ({"alpha_pattern": {"lm_head": 2}}, AdapterError, "alpha_pattern 'lm_head' matched no layer that gets an"),
        ({"rank_pattern": {"q_proj": 0}}, SettingsError, r"rank_pattern\['q_proj'\] = 0: input should be greater"),
        ({"rank_pattern": {"q_proj": True}}, SettingsError, "True of 'q_proj' is a truth value"),
        ({"alpha_pattern": {"q_proj": 0}}, SettingsError, r"alpha_pattern\['q_proj'\] = 0: input should be greater"),
        ({"alpha_pattern": {"q_proj": -1}}, SettingsError, r"alpha_pattern\['q_proj'\] = -1: input should be greater"),
        ({"layers_to_transform": []}, SettingsError, r"layers_to_transform = \[\]: it names no layer"),
        (
            {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1]},
            AdapterError,
            r"'model.layers.0.mlp.up_proj' is in no layer of those that were chosen: \[1\]",
        ),
        (
            {"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["lm_head"]},
            AdapterError,
            "'lm_head' is in target_modules and in modules_to_save",
        ),
        ({"exclude_modules": ["self_attn"]}, AdapterError, "'self_attn' names blocks, and none of the layers in them"),
        ({"exclude_modules": r".*\.mlp"}, AdapterError, r"matches blocks, and none of the layers in them, which r"),
        ({"exclude_modules": ["q_porj"]}, AdapterError, "exclude_modules 'q_porj' .*Did you mean 'q_proj'"),
        ({"exclude_modules": ".*q_porj"}, AdapterError, r"exclude_modules '\.\*q_porj' .*must match the whole name"),
    ],
)
def test_requests_that_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adapt(**arguments)


@pytest.mark.parametrize("mode", ["selective", "offload"])
def test_policies_that_need_fused_layers_are_refused_without_them(mode: str) -> None:
    with pytest.raises(SettingsError, match=f"'{mode}' needs fused decoder layers .the engine is not installed"):
        set_checkpointing(tiny.tiny_model("llama"), mode)
    other = tiny.tiny_model("mixtral")
    install(other)
    with pytest.raises(SettingsError, match=f"'{mode}' needs fused decoder layers .2 decoder layers run as"):
        set_checkpointing(other, mode)


@pytest.mark.parametrize(
    ("mode", "policy"),
    [
        (False, Policy.NONE),
        (True, Policy.FULL),
        ("selective", Policy.SEL_MIN),
        ("offload", Policy.OFFLOAD),
        ("auto", Policy.SEL_MIN),
        ("unsloth", Policy.SEL_MIN),
    ],
)
def test_each_mode_gives_the_fused_layers_their_policy(mode: Any, policy: Policy) -> None:
    model = tiny.tiny_model("llama")
    use_document_attention(model)
    engine = install(model)
    adapted = inject_adapter(model, AdapterSettings(use_gradient_checkpointing=mode))
    assert engine.policies == [policy, policy]
    assert facts_of(adapted).checkpointing == mode


def test_the_folder_of_what_is_offloaded_is_checked_made_and_removed(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    use_document_attention(model)
    engine = install(model)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        FastLanguageModel.get_peft_model(
            model, use_gradient_checkpointing="offload", temporary_location=str(tmp_path / "file")
        )
    place = tmp_path / "made" / "here"
    settings = AdapterSettings(use_gradient_checkpointing="offload", temporary_location=str(place))
    adapted = inject_adapter(model, settings)
    assert not place.exists()
    adapted.train()(input_ids=torch.arange(9)[None], use_cache=False).logits.sum().backward()
    assert place.is_dir() and not list(place.iterdir())
    assert any(p.grad is not None for p in adapted.parameters())
    (tmp_path / "made" / "other").write_text("stays")
    engine.store.close()
    assert not place.exists() and (tmp_path / "made" / "other").exists()


def test_tied_embeddings_are_not_parted() -> None:
    with pytest.raises(AdapterError, match="embedding and output head of this model are one tensor"):
        adapt(tiny.tiny_model("qwen3"), modules_to_save=["lm_head"])


@pytest.mark.parametrize(("mode", "expected"), [(True, True), ("unsloth", True), (False, False)])
def test_checkpointing_is_set_and_restored(mode: Any, expected: bool) -> None:
    model = adapt(use_gradient_checkpointing=mode)

    def is_on() -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    assert is_on() == expected
    assert FastLanguageModel.for_inference(model) is model
    assert not is_on() and not model.training and model.config.use_cache
    assert FastLanguageModel.for_training(model) is model
    assert is_on() == expected and model.training
    FastLanguageModel.for_training(model, use_gradient_checkpointing=not expected)
    assert is_on() != expected
