"""LoftQ: the base is rounded, the adapter starts with what that lost, and the rounded base goes where it goes."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoftQConfig, LoraConfig
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.adapters.loftq import normal_float, rounded
from tunesmith.adapters.model import raw_weights
from tunesmith.core.errors import AdapterError, OutputError, SettingsError
from tunesmith.engine.install import engine_of

from ..training.support import trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loftq") / "model"
    tiny.save_model(folder)
    return folder


def load(base: Path, **arguments: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(base), max_seq_length=256, **{"dtype": "float32", **arguments})[0]


def adapt(base: Path, bits: int = 4, iterations: int = 1, **arguments: Any) -> Any:
    config = {"loftq_bits": bits, "loftq_iter": iterations}
    return FastLanguageModel.get_peft_model(
        load(base), **{"r": 4, "target_modules": "all-linear", "loftq_config": config, **arguments}
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.arange(40, device=model.device)[None] * 7 % 300, use_cache=False
        ).logits.cpu()


def linear(model: Any) -> Any:
    return model.base_model.model.model.layers[0].mlp.up_proj


def test_four_bits_are_those_of_bitsandbytes() -> None:
    from bitsandbytes import functional

    torch.testing.assert_close(normal_float(4), functional.get_4bit_type("nf4", device="cpu"), rtol=0, atol=1e-4)
    assert normal_float(2).tolist() == pytest.approx([-1, 0, 0.3379, 1], abs=1e-4)


@pytest.mark.parametrize(("bits", "levels"), [(2, 4), (4, 16), (8, 255)])
@pytest.mark.parametrize("shape", [(24, 56), (5, 7)])
def test_rounding_leaves_few_values(bits: int, levels: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    low = rounded(weight, bits)
    assert low.shape == weight.shape
    blocks = low if bits == 8 else torch.nn.functional.pad(low.flatten(), (0, -low.numel() % 64)).view(-1, 64)
    assert all(len(block.unique()) <= levels for block in blocks)
    assert (low - weight).norm() < {2: 0.6, 4: 0.13, 8: 0.01}[bits] * weight.norm()
    # What is rounded already stays: NF4 with double quantization but for the last digits of its scales.
    torch.testing.assert_close(rounded(low, bits), low, rtol=2e-2 if bits == 4 else 1e-5, atol=1e-5)
    assert torch.equal(rounded(torch.zeros(shape), bits), torch.zeros(shape))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_less_is_lost_than_by_rounding(bits: int, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, whole = adapt(base, bits), load(base)
    layer, weight = linear(model), whole.model.layers[0].mlp.up_proj.weight
    low = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    live = layer.get_base_layer().weight
    assert torch.equal(live, rounded(weight, bits)), "one round starts from A = B = 0"
    assert (weight - live - low).norm() < 0.95 * (weight - live).norm()
    # No matrix of rank r is nearer to what rounding lost.
    rest = torch.linalg.svdvals(weight - live)[4:].norm()
    torch.testing.assert_close((weight - live - low).norm(), rest, rtol=1e-3, atol=1e-5)
    (line,) = [record.getMessage() for record in caplog.records if "LoftQ rounded" in record.getMessage()]
    lost, alone = (float(figure) for figure in re.findall(r"([\d.]+) %", line))
    assert f"14 weights of the base to {bits} bits" in line and 0 < lost < alone
    assert engine_of(model).plan.unknown == {} and engine_of(model).notes == []


def test_more_rounds_never_do_harm(base: Path) -> None:
    def rest(iterations: int) -> float:
        layer, whole = linear(adapt(base, 2, iterations)), load(base).model.layers[0].mlp.up_proj.weight
        low = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        return float((whole - layer.get_base_layer().weight - low).norm())

    assert rest(5) < rest(1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_with_its_base_and_found_wherever_it_is(
    bits: int, dtype: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model = FastLanguageModel.get_peft_model(load(base, dtype=dtype), r=4, loftq_config={"loftq_bits": bits})
    run = trainer(tmp_path / "run", model=model, max_steps=3, learning_rate=1e-2)
    run.train()
    live = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert f"is saved with its adapter in {tmp_path / 'adapter' / 'base'}" in caplog.text
    if dtype == "float32":  # in 16 bits PEFT's own layers round elsewhere
        plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
        torch.testing.assert_close(logits(plain), live, rtol=0, atol=1e-4)
    shutil.move(tmp_path / "adapter", tmp_path / "moved")
    again = load(tmp_path / "moved", dtype=dtype)
    assert torch.equal(logits(again), live)
    # Trained on and saved once more beside its base, it still finds it.
    again.save_pretrained(tmp_path / "moved")
    shutil.move(tmp_path / "moved", tmp_path / "last")
    assert torch.equal(logits(load(tmp_path / "last", dtype=dtype)), live)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_saved_base_is_what_so_many_bits_hold(bits: int, base: Path, tmp_path: Path) -> None:
    model, low = adapt(base, bits), {f"load_in_{bits}bit": True}
    model.save_pretrained(tmp_path)
    live = logits(model)
    near = (logits(load(tmp_path, **low)) - live).norm()
    far = (logits(load(base, **low)) - logits(load(base))).norm()
    assert near < 0.1 * far


@pytest.mark.parametrize("modules", [None, ["embed_tokens", "lm_head"]], ids=["frozen", "trained"])
def test_a_grown_base_is_found_with_its_rows(modules: Any, base: Path, tmp_path: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(base), dtype="float32", resize_model_vocab=340)
    model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights="loftq", modules_to_save=modules)
    model.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    assert again.get_input_embeddings().weight.shape[0] == 340
    assert torch.equal(logits(again), logits(model))


def test_switched_off_it_answers_as_the_saved_base(base: Path, tmp_path: Path) -> None:
    model = adapt(base, modules_to_save=["lm_head"])
    model.get_base_model().lm_head.modules_to_save["default"].weight.data.add_(0.1)
    live = logits(model)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(load(tmp_path / "base")), rtol=0, atol=1e-5)
    assert torch.equal(logits(load(tmp_path)), live)


def test_a_resumed_run_has_the_bytes_of_one_without_a_break(base: Path, tmp_path: Path) -> None:
    def run(*, resume: bool = False) -> dict[str, torch.Tensor]:
        model = adapt(base, 2, 2)
        trainer(tmp_path, model=model, max_steps=4, save_steps=2).train(resume_from_checkpoint=resume or None)
        return {name: p.detach() for name, p in model.named_parameters()}

    whole = run()
    assert not (tmp_path / "checkpoint-2" / "base").exists()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run(resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    with pytest.raises(AdapterError, match=r"rounded the base to few bits.*or resume the run from this checkpoint"):
        load(tmp_path / "checkpoint-4")


def test_dora_starts_from_the_rounded_weight(base: Path) -> None:
    layer = linear(adapt(base, 2, use_dora=True))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    now = layer.get_base_layer().weight + layer.scaling["default"] * b @ a
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, now.norm(dim=1))


def test_a_rank_above_that_of_the_weight(base: Path) -> None:
    model = adapt(base, 2, r=40)
    torch.testing.assert_close(logits(model), logits(load(base)), rtol=0, atol=1e-3)


def test_merged_it_answers_the_same(base: Path) -> None:
    model = adapt(base)
    live = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), live, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loftq_config": {"loftq_bits": 3}}, "loftq_bits=3 must be 2, 4 or 8"),
        ({"loftq_config": {"loftq_iter": 0}}, "loftq_iter=0 must be a whole number of at least 1"),
        ({"loftq_config": {"bits": 4}}, "unknown key 'bits'; these are loftq_bits, loftq_iter"),
        ({"init_lora_weights": "gaussian"}, "loftq_config and init_lora_weights='gaussian' both say how"),
    ],
)
def test_what_loftq_cannot_be_asked(arguments: dict[str, Any], message: str, base: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        adapt(base, **arguments)


def test_what_loftq_cannot_do(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.adapters import loftq
    from tunesmith.core.errors import ModelError

    with pytest.raises(
        AdapterError, match=r"a quantized base would be rounded again by that\. Load the base in 16 bits"
    ):
        FastLanguageModel.get_peft_model(load(base, load_in_4bit=True), loftq_config={"loftq_bits": 4})
    with pytest.raises(AdapterError, match="embeddings and heads do not start in this way"):
        adapt(base, target_modules=["q_proj", "lm_head"])
    adapted = adapt(base)
    for add in (lambda: adapted.add_adapter("x", LoraConfig(r=2)), lambda: adapted.load_adapter(tmp_path, "x")):
        with pytest.raises(AdapterError, match=r"a base that is saved with the first one \(LoftQ"):
            add()
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter" / "base")
    with pytest.raises(AdapterError, match="its base was saved with it in base/, which is not there"):
        load(tmp_path / "adapter")
    (tmp_path / "adapter" / "base.json").write_text("[]", encoding="utf-8")
    with pytest.raises(AdapterError, match="is not what tunesmith writes"):
        load(tmp_path / "adapter")
    monkeypatch.setattr(loftq, "installed", lambda package: None)
    with pytest.raises(ModelError, match="LoftQ in 4 bits needs the package bitsandbytes"):
        adapt(base)
    monkeypatch.setattr("tunesmith.core.files.free_bytes", lambda folder: 1)
    with pytest.raises(OutputError, match="the base, saved beside its adapter, needs"):
        adapted.save_pretrained(tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_a_config_of_peft_and_the_name_alone(base: Path) -> None:
    for asked in ({"loftq_config": LoftQConfig(loftq_bits=4)}, {"loftq_config": None, "init_lora_weights": "loftq"},
                  {"loftq_config": {}, "init_lora_weights": "loftq"}):  # fmt: skip
        model = adapt(base, **asked)
        assert model.peft_config["default"].loftq_config == {"loftq_bits": 4, "loftq_iter": 1}
    assert FastLanguageModel.get_peft_model(model, r=4, target_modules="all-linear", loftq_config={"loftq_iter": 1})
    with pytest.raises(AdapterError, match=r"loftq_config: .*'loftq_bits': 4.* -> .*'loftq_bits': 2"):
        FastLanguageModel.get_peft_model(model, r=4, target_modules="all-linear", loftq_config={"loftq_bits": 2})


def test_a_checkpoint_says_how_it_started(base: Path, tmp_path: Path) -> None:
    model = adapt(base)
    with raw_weights(model):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["init_lora_weights"] == "loftq"
    assert not (tmp_path / "base").exists()


def test_a_run_leaves_an_adapter_with_its_base(base: Path, tmp_path: Path) -> None:
    from tunesmith.training.preview import preview
    from tunesmith.training.run import run_training
    from tunesmith.training.settings import load_run_settings

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, tiny.chat_rows(12))), encoding="utf-8")
    asked = {"model": str(base), "data": str(rows), "output_dir": str(tmp_path / "run"), "max_steps": 1,
             "dtype": "float32", "max_seq_length": 256, "r": 4, "eval_split": 0,
             "loftq_config": {"loftq_bits": "2"}}  # fmt: skip
    settings, _ = load_run_settings(None, asked)
    size = sum(value.nbytes for value in tiny.tiny_model("llama").state_dict().values())
    assert preview(settings).disk["base beside the adapter"] == size
    live = logits(run_training(settings).trainer.model)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tmp_path / "run" / "adapter" / "base")
    assert torch.equal(logits(load(tmp_path / "run")), live)


@pytest.mark.usefixtures("exports_load_here")
def test_exported_it_is_compared_with_its_base(base: Path, tmp_path: Path) -> None:
    model = adapt(base, 2)
    reports = [model.save_pretrained_merged(tmp_path / name, save_method=name) for name in ("lora", "merged_32bit")]
    assert max(report.comparison.kl for report in reports) < 1e-6
    assert (tmp_path / "lora" / "base" / "model.safetensors").is_file()
    # The size of the adapter is that of the adapter alone.
    assert reports[0].size == (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert torch.equal(logits(load(tmp_path / "lora")), logits(model))
