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

STARTS = ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian", False]
TAKING = STARTS[:3]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts") / "model"
    tiny.tiny_model("llama").save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def load(base: Path, **arguments: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(base), max_seq_length=256, **{"dtype": "float32", **arguments})[0]


def adapt(base: Path, **arguments: Any) -> Any:
    return FastLanguageModel.get_peft_model(load(base), **{"r": 4, "target_modules": "all-linear", **arguments})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None] * 7 % 300, use_cache=False).logits


def plainly_reloaded(base: Path, adapter: Path) -> Any:
    """Return the saved adapter on the untouched base, through transformers and PEFT alone."""
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


@pytest.mark.parametrize("start", [*TAKING, "orthogonal", "gaussian"])
def test_a_new_adapter_changes_nothing(start: str, base: Path) -> None:
    torch.testing.assert_close(logits(adapt(base, init_lora_weights=start)), logits(load(base)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", TAKING)
def test_the_base_gives_what_the_adapter_starts_with(start: str, base: Path) -> None:
    model, before = adapt(base, init_lora_weights=start), load(base)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    taken = before.model.layers[0].mlp.up_proj.weight - layer.get_base_layer().weight
    torch.testing.assert_close(taken, layer.scaling["default"] * b @ a, rtol=1e-4, atol=1e-5)
    assert taken.norm() > 0.1 * before.model.layers[0].mlp.up_proj.weight.norm()
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


@pytest.mark.parametrize("start", TAKING)
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


def test_raw_weights_are_what_trains(base: Path, tmp_path: Path) -> None:
    model = adapt(base, init_lora_weights="pissa")
    with raw_weights(model):
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["init_lora_weights"]) == (4, "pissa")


def test_a_quantized_base_is_refused(base: Path) -> None:
    model = load(base, load_in_4bit=True)
    before = logits(model)
    for start in TAKING:
        with pytest.raises(AdapterError, match="a quantized base would be rounded again"):
            FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=start)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("text", "value"), [("pissa", "pissa"), ("TRUE", True), ("pissa_niter_8", "pissa_niter_8")])
def test_a_flag_is_text(text: str, value: Any) -> None:
    settings, _ = load_run_settings(None, {"model": "m", "data": "d", "init_lora_weights": text})
    assert settings.init_lora_weights == value
