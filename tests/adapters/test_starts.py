"""Starts that take something out of the base: trained on what is left, saved for the base as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.adapters.model import raw_weights
from tunesmith.core.errors import AdapterError
from tunesmith.engine.install import engine_of
from tunesmith.training.settings import load_run_settings

from ..training.support import trainer

STARTS = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "orthogonal", "gaussian", False, "eva"]
TAKING = STARTS[:5]
FROM_ROWS = ["eva", "corda", "lora_ga"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts") / "model"
    tiny.save_model(folder)
    return folder


def load(base: Path, **arguments: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(base), max_seq_length=256, **{"dtype": "float32", **arguments})[0]


def adapt(base: Path, **arguments: Any) -> Any:
    rows = tiny.chat_rows(16) if arguments.get("init_lora_weights") in FROM_ROWS else None
    asked = {"r": 4, "target_modules": "all-linear", "init_data": rows, **arguments}
    return FastLanguageModel.get_peft_model(load(base), **asked)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.arange(40, device=model.device)[None] * 7 % 300, use_cache=False
        ).logits.cpu()


def plainly_reloaded(base: Path, adapter: Path) -> Any:
    """Return the saved adapter on the untouched base, through transformers and PEFT alone."""
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


@pytest.mark.parametrize("start", [*TAKING, "orthogonal", "gaussian", "eva"])
def test_a_new_adapter_changes_nothing(start: str, base: Path) -> None:
    torch.testing.assert_close(logits(adapt(base, init_lora_weights=start)), logits(load(base)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", TAKING)
def test_the_base_gives_what_the_adapter_starts_with(start: str, base: Path) -> None:
    model, before = adapt(base, init_lora_weights=start), load(base)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    taken = before.model.layers[0].mlp.up_proj.weight - layer.get_base_layer().weight
    torch.testing.assert_close(taken, layer.scaling["default"] * b @ a, rtol=1e-4, atol=1e-5)
    # A gradient points elsewhere than the largest directions of a weight.
    assert taken.norm() > (0.01 if start == "lora_ga" else 0.1) * before.model.layers[0].mlp.up_proj.weight.norm()
    assert engine_of(model).plan.unknown == {} and engine_of(model).notes == []


@pytest.mark.parametrize(
    "more",
    [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}],
    ids=["plain", "rslora and patterns"],
)
@pytest.mark.parametrize("start", STARTS)
def test_the_saved_adapter_belongs_on_the_untouched_base(
    start: Any, more: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    model = adapt(base, init_lora_weights=start, **more)
    run = trainer(tmp_path / "run", model=model, max_steps=3, learning_rate=1e-2)
    run.train()
    live = logits(model)
    assert (live - logits(load(base))).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    # OLoRA's A is a whole R: what is left of B A - B0 A0 has lost some digits.
    near = {"rtol": 0, "atol": 2e-5 * float(live.abs().max())}
    torch.testing.assert_close(logits(plainly_reloaded(base, tmp_path / "adapter")), live, **near)
    torch.testing.assert_close(logits(load(tmp_path / "adapter")), live, **near)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == (8 if start in TAKING else 4)
    # Saving does not change what is there.
    assert torch.equal(logits(model), live)


@pytest.mark.parametrize("start", [*TAKING, "eva"])
def test_a_resumed_run_has_the_bytes_of_one_without_a_break(start: str, base: Path, tmp_path: Path) -> None:
    import shutil

    def run(*, resume: bool = False) -> dict[str, torch.Tensor]:
        model = adapt(base, init_lora_weights=start)
        trainer(tmp_path, model=model, max_steps=4, save_steps=2).train(resume_from_checkpoint=resume or None)
        return {name: p.detach() for name, p in model.named_parameters()}

    whole = run()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run(resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


@pytest.mark.parametrize("start", TAKING)
def test_switched_off_it_answers_as_the_base_was(start: str, base: Path) -> None:
    from tunesmith.evaluation import adapter_disabled

    model = adapt(base, init_lora_weights=start, modules_to_save=["lm_head"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    live, trainable = logits(model), [p.requires_grad for p in model.parameters()]
    with adapter_disabled(model):
        torch.testing.assert_close(logits(model), logits(load(base)), rtol=0, atol=1e-3)
    assert torch.equal(logits(model), live)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_a_loaded_one_that_cannot_be_switched_off_says_so(base: Path, tmp_path: Path) -> None:
    model = adapt(base, init_lora_weights="pissa")
    with raw_weights(model):
        model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="it cannot be switched off"), load(tmp_path).disable_adapter():
        pass
    with pytest.raises(AdapterError, match="a quantized base would be rounded again"):
        load(tmp_path, load_in_4bit=True)


def test_no_other_adapter_stands_on_what_is_left(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    adapt(base).save_pretrained(tmp_path)
    model = adapt(base, init_lora_weights="olora")
    for add in (lambda: model.add_adapter("x", LoraConfig(r=2)), lambda: model.load_adapter(tmp_path, "x")):
        with pytest.raises(AdapterError, match="adapter 'x' would stand on what the first one left of the base"):
            add()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_no_start_that_changes_the_base_stands_beside_another_adapter(start: str, base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    taking = adapt(base, init_lora_weights=start)
    with raw_weights(taking):
        taking.save_pretrained(tmp_path)
    model = adapt(base)
    live = logits(model)
    with pytest.raises(AdapterError, match=f"cannot share its base: .*init_lora_weights='{start}'"):
        model.load_adapter(tmp_path, "x")
    with pytest.raises(AdapterError, match=f"adapter 'x' would start with init_lora_weights='{start}'"):
        model.add_adapter("x", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start))
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(AdapterError, match="took a random approximation out of the base"):
        model.load_adapter(tmp_path, "x")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), live)


@pytest.mark.parametrize("start", TAKING)
def test_taken_off_or_merged_the_base_is_whole(start: str, base: Path, tmp_path: Path) -> None:
    def trained() -> Any:
        model = adapt(base, init_lora_weights=start, modules_to_save=["lm_head"])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        return model

    model, before = trained(), logits(load(base))
    live = logits(model)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="this adapter is merged"), model.disable_adapter():
        pass
    torch.testing.assert_close(logits(model.unload()), before, rtol=0, atol=1e-3)
    model = trained()
    torch.testing.assert_close(logits(model.unload()), before, rtol=0, atol=1e-3)
    model = trained()
    live = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), live, rtol=0, atol=1e-3)


def test_a_loaded_one_is_not_taken_off(base: Path, tmp_path: Path) -> None:
    model = adapt(base, init_lora_weights="pissa")
    with raw_weights(model):
        model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="it cannot be switched off"):
        load(tmp_path).unload()


def test_an_adapter_on_a_merged_base_is_saved_with_it(base: Path, tmp_path: Path) -> None:
    first = adapt(base, init_lora_weights=False)
    second = FastLanguageModel.get_peft_model(first.merge_and_unload(), r=2, init_lora_weights=False)
    live = logits(second)
    assert (live - logits(load(base))).abs().max() > 0.1
    second.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load(tmp_path / "adapter")), live, rtol=0, atol=1e-4)
    assert (tmp_path / "adapter" / "base" / "config.json").is_file()


def test_ways_to_save_that_would_not_convert(base: Path, tmp_path: Path) -> None:
    model = adapt(base, init_lora_weights="pissa")
    for asked in ({"safe_serialization": False}, {"path_initial_model_for_weight_conversion": str(tmp_path)}):
        with pytest.raises(AdapterError, match="is saved for the base as it was, as safetensors"):
            model.save_pretrained(tmp_path / "adapter", **asked)


def test_every_adapter_says_how_its_base_was_loaded(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = FastLanguageModel.get_peft_model(load(base, load_in_4bit=True), r=2)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, True, ["second"])
    assert (tmp_path / "second" / "base.json").is_file() and not (tmp_path / "base.json").exists()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "base.json").is_file()


@pytest.mark.parametrize("start", [*TAKING, "loftq", "eva"])
def test_shapes_alone_can_be_planned(start: str, base: Path) -> None:
    from tunesmith.adapters.inject import inject_adapter
    from tunesmith.adapters.settings import AdapterSettings
    from tunesmith.adapters.state import empty_source

    empty, _ = empty_source(str(base), dtype="float32")
    model = inject_adapter(empty, AdapterSettings(r=4, init_lora_weights=start))
    assert all(p.is_meta for p in model.parameters())


def test_embeddings_do_not_start_in_this_way(base: Path) -> None:
    with pytest.raises(AdapterError, match="embeddings and heads do not start in this way"):
        adapt(base, init_lora_weights="pissa", target_modules=["q_proj", "embed_tokens"])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_rank_above_the_directions_of_a_layer_is_refused(start: str, base: Path) -> None:
    """A and B would be smaller than the config of the saved adapter says, and no library could load it."""
    with pytest.raises(AdapterError, match=f"'{start}' takes 20 directions of .*k_proj at rank 20, which has 16"):
        adapt(base, init_lora_weights=start, r=20)


@pytest.mark.parametrize("width", ["load_in_4bit", "load_in_8bit"])
def test_two_subspaces_on_a_quantized_base(width: str, base: Path, tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(load(base, **{width: True}), r=4, init_lora_weights="orthogonal")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.any() for p in trained)
    torch.testing.assert_close(logits(model), logits(load(base, **{width: True})), rtol=0, atol=1e-4)
    trainer(tmp_path / "run", model=model, max_steps=2, learning_rate=1e-2).train()
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load(tmp_path / "adapter")), logits(model), rtol=0, atol=1e-4)
    again = load(base, **{width: True})
    plain = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-4)
    with pytest.raises(AdapterError, match="needs an even rank, and r is 5"):
        FastLanguageModel.get_peft_model(load(base, **{width: True}), r=5, init_lora_weights="orthogonal")


def test_raw_weights_are_what_trains(base: Path, tmp_path: Path) -> None:
    model = adapt(base, init_lora_weights="pissa")
    with raw_weights(model):
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["init_lora_weights"]) == (4, "pissa")


def test_a_quantized_base_is_refused(base: Path) -> None:
    model = load(base, load_in_4bit=True)
    before = logits(model)
    for start in TAKING[:3]:
        with pytest.raises(AdapterError, match="a quantized base would be rounded again"):
            FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=start)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("text", "value"), [("pissa", "pissa"), ("TRUE", True), ("pissa_niter_8", "pissa_niter_8")])
def test_a_flag_is_text(text: str, value: Any) -> None:
    settings, _ = load_run_settings(None, {"model": "m", "data": "d", "init_lora_weights": text})
    assert settings.init_lora_weights == value
