"""Filters of multimodal models: which layers get an adapter, decided by the structure of the model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tests import tiny, tiny_vision

from tunesmith import FastLanguageModel, FastVisionModel
from tunesmith.adapters.inject import continue_adapter
from tunesmith.adapters.parts import filtered_targets, places_of
from tunesmith.adapters.settings import FILTERS, AdapterSettings
from tunesmith.core.errors import AdapterError, SettingsError

OFF = dict.fromkeys(FILTERS, False)


def adapted_layers(model: Any) -> set[str]:
    """Return the names in the base of the layers with a trainable lora_B."""
    return {
        name.removeprefix("base_model.model.").partition(".lora_B")[0]
        for name, parameter in model.named_parameters()
        if "lora_B" in name and parameter.requires_grad
    }


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("qwen2-vl", {("vision", "attention"): 4, ("vision", "mlp"): 4, ("vision", "connector"): 2,
                      ("language", "attention"): 8, ("language", "mlp"): 6}),
        ("gemma3", {("vision", "attention"): 8, ("vision", "mlp"): 4, ("language", "attention"): 8,
                    ("language", "mlp"): 6}),
    ],
)  # fmt: skip
def test_layers_are_sorted_by_part_and_kind(family: str, counts: dict[Any, int]) -> None:
    places = places_of(tiny_vision.vision_model(family))
    assert Counter((place.part, place.kind) for place in places.values()) == counts
    assert all((place.depth is None) == (place.kind == "connector") for place in places.values())
    assert "lm_head" not in places


@pytest.mark.parametrize("family", tiny_vision.FAMILIES)
@pytest.mark.parametrize(
    ("on", "part", "kind"),
    [
        ({"finetune_vision_layers": False}, {"language"}, {"attention", "mlp"}),
        ({"finetune_language_layers": False}, {"vision"}, {"attention", "mlp"}),
        ({"finetune_mlp_modules": False}, {"vision", "language"}, {"attention"}),
        ({"finetune_attention_modules": False}, {"vision", "language"}, {"mlp"}),
        ({"finetune_vision_layers": False, "finetune_mlp_modules": False}, {"language"}, {"attention"}),
        ({}, {"vision", "language"}, {"attention", "mlp"}),
    ],
)
def test_adapters_stand_exactly_where_the_filters_say(family: str, on: Any, part: set[str], kind: set[str]) -> None:
    places = places_of(tiny_vision.vision_model(family))
    model = FastVisionModel.get_peft_model(tiny_vision.vision_model(family), r=2, **on)
    expected = {name for name, place in places.items() if place.part in part and place.kind in kind}
    assert adapted_layers(model) == expected
    assert FastVisionModel.get_peft_model(model, r=2, **on) is model


def test_names_and_filters_meet() -> None:
    model = tiny_vision.vision_model("gemma3")
    model = FastVisionModel.get_peft_model(model, target_modules=["q_proj", "fc1"], finetune_language_layers=False)
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"q_proj", "fc1"}
    assert all("vision_tower" in name for name in adapted_layers(model))


@pytest.mark.parametrize("asked", ["all-linear", [r"merger.mlp.0"]])
def test_projectors_get_an_adapter_only_when_they_are_named(asked: Any) -> None:
    merger = "model.visual.merger.mlp.0"
    usual = FastVisionModel.get_peft_model(tiny_vision.vision_model("qwen2-vl"))
    assert merger not in adapted_layers(usual)
    named = FastVisionModel.get_peft_model(tiny_vision.vision_model("qwen2-vl"), target_modules=asked)
    assert merger in adapted_layers(named)
    model = tiny_vision.vision_model("qwen2-vl")
    without = FastVisionModel.get_peft_model(model, target_modules="all-linear", finetune_vision_layers=False)
    assert not any("visual" in name for name in adapted_layers(without))


def test_an_expression_takes_the_layers_of_what_it_matches() -> None:
    model = FastVisionModel.get_peft_model(tiny_vision.vision_model("gemma3"), target_modules=".*language_model.*")
    assert len(adapted_layers(model)) == 14


def test_a_layer_named_alone_is_alone() -> None:
    name = "model.language_model.layers.1.mlp.up_proj"
    model = FastVisionModel.get_peft_model(tiny_vision.vision_model("gemma3"), target_modules=[name])
    assert adapted_layers(model) == {name}


def test_the_last_layers_are_those_of_the_language_model() -> None:
    model = tiny_vision.vision_model("qwen2-vl")
    model = FastVisionModel.get_peft_model(model, finetune_last_n_layers=1, finetune_vision_layers=False)
    assert {name.split(".layers.")[1][0] for name in adapted_layers(model)} == {"1"}
    assert len(adapted_layers(model)) == 7


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (OFF, "finetune_vision_layers, finetune_language_layers, finetune_audio_layers are all False"),
        ({"finetune_attention_modules": False, "finetune_mlp_modules": False}, "_attention_modules, .* are all False"),
        ({"target_modules": ["fc1"], "finetune_vision_layers": False}, "leaves no layer of .* among target_modules"),
        ({"target_modules": ["q_porj"]}, "'q_porj' matched no layer"),
        ({"target_modules": ["q_proj", "lm_head"]}, "matches lm_head, which is no linear layer of a part"),
        ({"target_modules": ["embed_tokens"]}, "matches .*embed_tokens, which is no linear layer of a part"),
        ({"finetune_audio_layers": True}, "Gemma3ForConditionalGeneration has no audio part"),
        ({"finetune_last_n_layers": 1}, "count the layers of the language model. Give finetune_vision_layers=False"),
    ],
)
def test_filters_that_cannot_be_followed_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        FastVisionModel.get_peft_model(tiny_vision.vision_model("gemma3"), **asked)


@pytest.mark.parametrize("name", [name for name in FILTERS if name != "finetune_vision_layers"])
def test_a_language_model_has_no_parts_to_choose_from(name: str) -> None:
    value = not AdapterSettings.model_fields[name].default
    with pytest.raises(AdapterError, match=f"{name}={value} chooses a part of a multimodal model, and LlamaForCausal"):
        FastLanguageModel.get_peft_model(tiny.tiny_model(), **{name: value})


def test_a_language_model_trains_no_vision_layers_when_told_so() -> None:
    plain = adapted_layers(FastLanguageModel.get_peft_model(tiny.tiny_model()))
    assert adapted_layers(FastLanguageModel.get_peft_model(tiny.tiny_model(), finetune_vision_layers=False)) == plain


def test_an_adapter_that_goes_on_keeps_its_parts() -> None:
    model = FastVisionModel.get_peft_model(tiny_vision.vision_model("gemma3"), finetune_vision_layers=False)
    same = AdapterSettings(finetune_vision_layers=False)
    continue_adapter(model, same, {"finetune_vision_layers"})
    with pytest.raises(SettingsError, match="keeps its own settings"):
        continue_adapter(model, AdapterSettings(), {"finetune_vision_layers"})
    with pytest.raises(AdapterError, match="already carries an adapter with other settings"):
        FastVisionModel.get_peft_model(model)


def test_the_expression_is_short_where_layers_repeat() -> None:
    filters = {**AdapterSettings().filters, "finetune_vision_layers": False, "finetune_mlp_modules": False}
    found = filtered_targets(tiny_vision.vision_model("gemma3"), None, filters)
    attention = "|".join(rf"self_attn\.{name}_proj" for name in "qkvo")
    assert found == rf"model\.language_model\.layers\.\d+\.(?:{attention})"
