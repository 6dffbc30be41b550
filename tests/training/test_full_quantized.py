"""All weights train while they are stored in 8 bits, or computed in 4: gradients, steps, checkpoints and results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.core.errors import SettingsError
from tunesmith.engine.install import engine_of
from tunesmith.engine.read import four_bit_weight
from tunesmith.memory import shape_of
from tunesmith.models.load import facts_of
from tunesmith.models.quantize import protect_gradients, quantize_nf4
from tunesmith.models.whole import FourBitLinear, decoder_linears, int8_layers
from tunesmith.ops.quantized import reference
from tunesmith.training.settings import load_run_settings

from .support import trainer

WIDTHS = ("8bit", "4bit")
IDS = torch.arange(20).view(1, 20) * 7 % tiny.VOCABULARY


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Compiling an update for each shape takes a CPU longer than the rest of a test."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models: untied, tied, with biases, and of a family that the engine does not know."""
    made: dict[str, Path] = {}
    for family in ("llama", "qwen2", "qwen3", "mixtral"):
        made[family] = tmp_path_factory.mktemp("whole") / family
        tiny.save_model(made[family], family)
    return made


def load(folder: Path, width: str | None, **arguments: Any) -> Any:
    asked = {} if width is None else {f"load_in_{width}": True, "full_finetuning": True}
    given = {"dtype": "float32", "use_gradient_checkpointing": False, **asked, **arguments}
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=256, **given)[0]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = IDS.to(model.device)
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def dense(layer: Any) -> torch.Tensor:
    """Return the numbers that a layer computes with."""
    if isinstance(layer, FourBitLinear):
        return reference.dequantize(four_bit_weight(*layer.quantized())).to(layer.weight.dtype)
    return layer.weight.dequantize()


def values(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of all weights, int8 ones as what they stand for."""
    parameters = dict(model.named_parameters())
    return {name: p.dequantize() if hasattr(p, "int_data") else p.detach().clone() for name, p in parameters.items()}


def eval_loss(model: Any, folder: Path) -> float:
    return trainer(folder, model=model, eval_dataset=tiny.chat_rows(6, seed=9)).evaluate()["eval_loss"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_numbers_that_it_computes_with(
    family: str, width: str, checkpointing: bool, folders: dict[str, Path]
) -> None:
    model = load(folders[family], width, use_gradient_checkpointing=checkpointing)
    twin = load(folders[family], None, full_finetuning=True)
    plain = dict(twin.named_modules())
    layers = list(decoder_linears(model))
    assert layers
    for name, layer in layers:
        assert not torch.equal(dense(layer), plain[name].weight)  # something was rounded
        plain[name].weight.data.copy_(dense(layer))
    wanted = gradients(twin)
    for name, grad in gradients(model).items():
        assert type(grad) is torch.Tensor
        assert (grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-8, name


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_moves_every_weight_and_lowers_the_loss(
    width: str, dtype: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(folders["llama"], width, dtype=dtype, use_gradient_checkpointing="unsloth")
    before = values(model)
    run = trainer(tmp_path, model=model, rows=12, num_train_epochs=3, learning_rate=2e-2, save_strategy="no")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])  # the last epoch against the first
    after = values(model)
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_4_bits_stay_until_the_weight_changes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("tunesmith.models.whole.quantize_nf4", lambda weight: made.append(1) or quantize_nf4(weight))
    layer = FourBitLinear.around(torch.nn.Linear(64, 32, bias=False, dtype=dtype))
    x = torch.eye(64, dtype=dtype)

    def changes() -> Iterator[None]:
        yield
        with torch.no_grad():
            layer.weight[3, 5] += 1
        yield
        layer.weight.data[7, 9] -= 1  # has no version
        yield
        layer.weight.data.fill_(0.5)
        yield
        layer.weight.data.fill_(0.25)
        yield
        layer.weight = torch.nn.Parameter(torch.randn(32, 64).to(dtype))
        yield
        layer.weight.data.copy_(layer.weight.data.flip(0))
        yield
        layer.weight.data.copy_(layer.weight.data.flip(1))
        yield

    for count, _ in enumerate(changes(), 1):
        for _ in range(3):
            assert torch.equal(layer(x).T, dense(layer))
        assert len(made) == count + 3 * count  # dense() makes its own
    kept = layer._codes()
    assert layer.codes_bytes == kept.codes.nbytes + kept.scales.nbytes


def test_a_plan_counts_the_codes_of_4_bits(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], "4bit")
    entries = sum(layer.weight.numel() for _, layer in decoder_linears(model))
    assert shape_of(model).codes == pytest.approx(entries * 33 / 64, rel=0.01)
    assert not shape_of(load(folders["llama"], "8bit")).codes
    assert not shape_of(model, kind="cuda").codes


def test_8_bits_are_all_that_is_stored(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["llama"], "8bit")
    layers = int8_layers(model)
    assert len(layers) == 14 and "lm_head" not in layers
    assert {layer.weight.int_data.dtype for layer in layers.values()} == {torch.int8}
    assert trainer(tmp_path, model=model).args.optim == "adamw_torch_8bit"
    assert shape_of(model).compiles and not shape_of(load(folders["llama"], "4bit")).compiles
    whole, own = shape_of(load(folders["llama"], None, full_finetuning=True)), shape_of(model)
    entries = sum(layer.weight.numel() for layer in layers.values())
    rows = sum(layer.weight.shape[0] for layer in layers.values())
    assert whole.trained_bytes - own.trained_bytes == 3 * entries - 4 * rows
    assert own.gradient_bytes == whole.gradient_bytes == whole.trained_bytes


def test_small_steps_are_not_lost_in_8_bits(folders: dict[str, Path]) -> None:
    from tunesmith.training.optimizer import int8_adamw

    model = load(folders["llama"], "8bit")
    weight = model.model.layers[0].mlp.up_proj.weight
    before, steps, rate = weight.dequantize().clone(), 40, 1e-4
    step_of_int8 = weight.scale.mean()
    assert rate < 0.1 * step_of_int8  # rounded to nearest, no step would show
    optimizer = int8_adamw()([weight], lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = torch.ones(weight.shape)
        optimizer.step()
    moved = (weight.dequantize() - before).mean()
    assert float(moved) == pytest.approx(-steps * rate, rel=0.3)


def test_moments_have_8_bits_and_those_of_small_weights_are_float32() -> None:
    from tunesmith.training.optimizer import int8_adamw

    weights = [torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in (4096, 4095)]
    optimizer = int8_adamw()(weights, lr=1e-3)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    large, small = (optimizer.state[weight]["exp_avg_sq"] for weight in weights)
    assert large.codes.dtype == torch.uint8
    assert small.dtype == torch.float32
    # Loading does not round them to the dtype of their weight.
    again = int8_adamw()(weights, lr=1e-3)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[weights[1]]["exp_avg_sq"], small)
    assert torch.equal(again.state[weights[0]]["exp_avg_sq"].codes, large.codes)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_bytes_of_one_without_a_break(
    width: str, dtype: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    def run(folder: Path, *, resume: bool = False) -> dict[str, torch.Tensor]:
        model = load(folders["llama"], width, dtype=dtype)
        trainer(folder, model=model, max_steps=4, save_steps=2).train(resume_from_checkpoint=resume or None)
        parts = {name: p for name, p in model.named_parameters() if not hasattr(p, "int_data")}
        parts |= {f"{name}.codes": layer.weight.int_data for name, layer in int8_layers(model).items()}
        return parts | {f"{name}.scales": layer.weight.scale for name, layer in int8_layers(model).items()}

    whole = run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run(tmp_path, resume=True)
    assert [name for name, value in resumed.items() if not torch.equal(value, whole[name])] == []


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_result_of_8_bits_is_a_plain_model(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load(folders[family], "8bit")
    trainer(tmp_path / "run", model=model, max_steps=3).train()
    model.eval().save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert type(again).__name__ == type(model).__name__
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_result_of_4_bits_is_the_4_bit_model_with_the_same_loss(
    family: str, dtype: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(folders[family], "4bit", dtype=dtype)
    run = trainer(tmp_path / "run", model=model, max_steps=3)
    run.train()
    live = eval_loss(model, tmp_path / "live")
    model.save_pretrained(tmp_path / "model")
    assert not hasattr(model.config, "quantization_config")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    # Really quantized layers of bitsandbytes, in our engine and in transformers alone; an adapter only to be trainable.
    stored = load(tmp_path / "model", None, dtype=dtype)
    assert facts_of(stored).width == "4bit" and engine_of(stored).plan.unknown == {}
    stored = FastLanguageModel.get_peft_model(stored, r=1)
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # 16 bits: other kernels, other rounding
    assert eval_loss(stored, tmp_path / "stored") == pytest.approx(live, abs=tolerance)
    if dtype == "float32":
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        protect_gradients(theirs)
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_banner_says_how_it_trains(width: str, folders: dict[str, Path]) -> None:
    notes = "\n".join(facts_of(load(folders["llama"], width)).notes)
    assert f"full fine-tuning in {width[0]} bits" in notes and "MiB" in notes
    assert "2 decoder layers run as transformers wrote them, slower" in notes


@pytest.mark.parametrize("width", WIDTHS)
def test_a_run_leaves_a_model_and_can_be_repeated_from_its_settings(
    width: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    from tunesmith.training.preview import preview
    from tunesmith.training.run import run_training

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(20)), encoding="utf-8")
    asked = {
        "model": str(folders["llama"]), "data": str(rows), "output_dir": str(tmp_path / "run"), "max_steps": 2,
        "dtype": "float32", "full_finetuning": True, f"load_in_{width}": True,
    }  # fmt: skip
    settings, _ = load_run_settings(None, asked)
    planned = preview(settings).shape
    result = run_training(settings)
    assert planned.trained_bytes == shape_of(result.trainer.model).trained_bytes
    again = load(tmp_path / "run", None)
    assert facts_of(again).width == ("4bit" if width == "4bit" else None)
    once_more, _ = load_run_settings(tmp_path / "run" / "settings.yaml", {})
    assert once_more == settings


def test_an_optimizer_that_int8_weights_lack_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    run = {"model": "m", "data": "d", "full_finetuning": True, "load_in_8bit": True}
    with pytest.raises(SettingsError, match="optim=lion_32bit: int8 weights can only be updated by adamw_torch_8bit"):
        load_run_settings(None, {**run, "optim": "lion_32bit"})
    assert load_run_settings(None, run)[0].optim == "adamw_torch_8bit"
    for optim in ("adafactor", "adamw_torch_fused"):
        with pytest.raises(SettingsError, match=f"optim={optim}: int8 weights can only be updated by"):
            trainer(tmp_path, model=load(folders["llama"], "8bit"), optim=optim)
    assert load_run_settings(None, {**run, "optim": "adamw_torch_8bit"})[0].optim == "adamw_torch_8bit"


def test_several_processes_are_refused_in_8_bits() -> None:
    from types import SimpleNamespace

    from tunesmith.training.optimizer import _for_int8

    args = SimpleNamespace(optim="adamw_torch_fused", asked_for_optim=False, world_size=2)
    with pytest.raises(SettingsError, match="trains in one process"):
        _for_int8(args)
