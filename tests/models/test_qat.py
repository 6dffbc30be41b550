"""Training for a scheme of torchao: what is rounded, what a machine can do with it, and what is exported."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import forking, tiny
from tests.training.support import trainer

from tunesmith import FastLanguageModel
from tunesmith.core.errors import AdapterError, ExportError, ModelError, NotSupportedYetError, SettingsError
from tunesmith.data.masks import ExampleEncoder
from tunesmith.data.prepare import prepare
from tunesmith.engine.install import engine_of
from tunesmith.engine.lora import merged_weight
from tunesmith.models.load import facts_of
from tunesmith.models.qat import SCHEMES, conversion_fails, scheme_of, training_fails
from tunesmith.training.settings import load_run_settings

pytestmark = pytest.mark.usefixtures("exports_load_here")

CONVERTED_HERE = ("int8-int4", "int8")
# transformers' attention adds in another order, and where activations are rounded to int8 a last bit can become a step.
FOUR_DIGITS = 1e-4
IDS = torch.arange(20).view(1, 20) * 7 % tiny.VOCABULARY


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models whose widths every scheme fits ("wide"), tied, and with widths that groups of 32 lack."""
    made: dict[str, Path] = {}
    for name, family, changes in (
        ("wide", "llama", {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.1}),
        ("tied", "qwen3", {"intermediate_size": 64}),
        ("odd", "llama", {}),
    ):
        made[name] = tmp_path_factory.mktemp("qat") / name
        tiny.tiny_model(family, **changes).save_pretrained(made[name])
        tiny.tiny_tokenizer().save_pretrained(made[name])
    return made


def load(folder: Path, **arguments: Any) -> Any:
    given = {"dtype": "float32", "use_gradient_checkpointing": False, **arguments}
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=256, **given)[0]


def whole(folder: Path, scheme: Any = "int8-int4", **arguments: Any) -> Any:
    return load(folder, full_finetuning=True, qat_scheme=scheme, **arguments)


def adapted(folder: Path, scheme: Any = "int8-int4", **arguments: Any) -> Any:
    """Return a model with a rounded base and an adapter on it whose B is not zero."""
    settings = {"r": 4, "use_gradient_checkpointing": False, **arguments}
    model = FastLanguageModel.get_peft_model(load(folder), qat_scheme=scheme, **settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def rounded(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """Return what torchao really stores of a weight."""
    from torchao.quantization import quantize_

    holder = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    holder[0].weight.data.copy_(weight)
    quantize_(holder, scheme_of(scheme).config)
    return holder[0].weight.dequantize()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_trains_all_weights(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = whole(folders["wide"], scheme)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not torch.allclose(logits(model), logits(load(folders["wide"])), atol=1e-4)  # it computes rounded
    run = trainer(tmp_path, model=model, rows=8, num_train_epochs=3, save_strategy="no")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_trains_an_adapter(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(load(folders["wide"]), r=4, qat_scheme=scheme)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = trainer(tmp_path, model=model, rows=8, num_train_epochs=3, learning_rate=2e-2, save_strategy="no")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < 0.97 * sum(losses[:2])
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_base_and_adapter_are_rounded_together(folders: dict[str, Path]) -> None:
    model = adapted(folders["wide"], "int8")
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(3, 128)
    together = rounded(merged_weight(layer), "int8")
    torch.testing.assert_close(layer(x), x @ together.T, rtol=1e-5, atol=1e-5)
    base = layer.get_base_layer().weight
    apart = rounded(base, "int8") + (merged_weight(layer) - base)
    assert not torch.allclose(layer(x), x @ apart.T, rtol=1e-3, atol=1e-3)


def test_gradients_of_an_adapter_pass_the_rounding(folders: dict[str, Path]) -> None:
    model, plain = adapted(folders["wide"], "int8"), FastLanguageModel.get_peft_model(load(folders["wide"]), r=4)
    plain.load_state_dict(model.state_dict(), strict=False)
    for one in (model, plain):
        one.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # int8 moves weights by half a percent: a gradient that were cut off or doubled would show.
            assert torch.nn.functional.cosine_similarity(parameter.grad.flatten(), wanted[name].flatten(), 0) > 0.95
            assert parameter.grad.norm() == pytest.approx(float(wanted[name].norm()), rel=0.2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_the_rounding_whatever_their_size(scheme: str, folders: dict[str, Path]) -> None:
    layer = whole(folders["wide"], scheme).model.layers[0].mlp.up_proj
    x, slope = torch.randn(9, 128, requires_grad=True), 1e-6 * torch.randn(9, 128)
    (layer(x) * slope).sum().backward()
    # torchao's own would be rounded to float8 on their way, where nearly all of these are zero.
    assert (layer.weight.grad - slope.T @ x.detach()).norm() < 0.1 * layer.weight.grad.norm()
    assert (x.grad - slope @ layer.weight.detach()).norm() < 0.2 * x.grad.norm()


def test_an_adapter_that_is_switched_off_leaves_the_rounded_base(folders: dict[str, Path]) -> None:
    model, base = adapted(folders["wide"]), whole(folders["wide"])
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base))
    assert not torch.allclose(logits(model), logits(base), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_this_machine_can_train_and_convert_is_tried(dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    schemes = {name: scheme_of(name) for name in SCHEMES}
    assert {name: training_fails(scheme, [128], dtype) for name, scheme in schemes.items()} == dict.fromkeys(SCHEMES)
    found = {name: conversion_fails(scheme, [128], dtype) for name, scheme in schemes.items()}
    assert [name for name, reason in found.items() if reason is None] == list(CONVERTED_HERE)
    assert found["int4"] == (
        "int4 can be trained here, but neither converted nor run: it needs a GPU with the package mslk (1.0 or newer)"
    )
    assert "compute capability 8.9" in found["fp8-fp8"]
    assert training_fails(schemes["fp8-int4"], [128, 192], dtype) == (
        "it needs widths that are multiples of 128, and this model has one of 192."
    )


def test_a_scheme_that_cannot_be_converted_here_says_so_at_once_and_when_it_is_exported(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    model = whole(folders["wide"], "int4")
    sentence = "int4 can be trained here, but neither converted nor run: it needs a GPU with the package mslk"
    assert any(sentence in note for note in facts_of(model).notes)
    with pytest.raises(ModelError, match=sentence):
        model.save_pretrained_torchao(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_layers_that_are_not_fused_say_why(folders: dict[str, Path]) -> None:
    for model in (whole(folders["wide"]), adapted(folders["wide"])):
        assert "2 decoder layers run as transformers wrote them, slower: a layer is a FakeQuantizedLinear" in (
            facts_of(model).notes
        )
        assert engine_of(model).plan.known == {}
        assert "quantization-aware training for int8-int4" in "\n".join(facts_of(model).notes)


# ---- the whole way ----


def loss_of(model: Any) -> float:
    """Return the loss a trained token of rows that no run here trains on, row by row from the model's own logits."""
    total, count = 0.0, 0
    rows = prepare(tiny.chat_rows(6, seed=9), ExampleEncoder(tiny.tiny_tokenizer()), max_length=256)
    for document in rows.documents:
        ids, trained = torch.as_tensor(document.input_ids), torch.as_tensor(document.trained)
        with torch.no_grad():
            found = model.eval()(input_ids=ids[None].long(), use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(found, ids[1:].long(), reduction="none")[trained[1:]]
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


def load_plain(folder: Any) -> Any:
    """Return what transformers alone makes of a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("scheme", "kind", "name"),  # every two of them meet
    [("int8-int4", whole, "wide"), ("int8-int4", adapted, "tied"), ("int8", whole, "tied"), ("int8", adapted, "wide")],
)
def test_the_converted_model_has_the_loss_of_the_trained_one(
    scheme: str, kind: Any, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = kind(folders[name], scheme)
    run = trainer(tmp_path / "run", model=model, max_steps=2, eval_dataset=tiny.chat_rows(6, seed=9), eval_steps=10)
    run.train()
    live = run.evaluate()["eval_loss"]
    report = model.save_pretrained_torchao(tmp_path / "out", tiny.tiny_tokenizer())
    assert report.comparison.kl < 1e-5 and report.comparison.tokenizer == "equal"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {f.name for f in (tmp_path / "out").iterdir()}
    assert loss_of(load_plain(tmp_path / "out")) == pytest.approx(live, rel=FOUR_DIGITS)


def test_a_fresh_process_finds_the_same_loss(folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(folders["wide"])
    model.save_pretrained_torchao(tmp_path / "out", tiny.tiny_tokenizer())
    process = forking.start(_print_loss, tmp_path / "out", out=tmp_path / "printed")
    process.join()
    printed = (tmp_path / "printed").read_text(encoding="utf-8")
    assert process.exitcode == 0, printed
    assert float(printed.splitlines()[-1]) == pytest.approx(loss_of(model), rel=FOUR_DIGITS)


def _print_loss(folder: Path) -> None:
    print(loss_of(load_plain(folder)), flush=True)


def test_a_converted_model_is_loaded_for_answers_and_not_for_training(folders: dict[str, Path], tmp_path: Path) -> None:
    model = whole(folders["wide"])
    model.save_pretrained_torchao(tmp_path / "out", tiny.tiny_tokenizer())
    stored = load(tmp_path / "out")
    torch.testing.assert_close(logits(stored), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="torchao has quantized"):
        FastLanguageModel.get_peft_model(stored, r=2)
    with pytest.raises(AdapterError, match="full_finetuning=True needs a base in 16 or 32 bits"):
        load(tmp_path / "out", full_finetuning=True)


def test_a_model_that_was_not_trained_for_it_can_be_quantized_too(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["wide"])
    with pytest.raises(SettingsError, match="torchao_config is missing"):
        model.save_pretrained_torchao(tmp_path / "out")
    assert 1e-4 < model.save_pretrained_torchao(tmp_path / "out", None, "int8-int4").comparison.kl < 0.5
    torch.testing.assert_close(
        logits(load_plain(tmp_path / "out")), logits(whole(folders["wide"])), rtol=1e-4, atol=1e-4
    )


def test_an_export_that_is_not_what_was_trained_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from tunesmith.export.torchao import _refuse_difference

    model = whole(folders["wide"])
    model.save_pretrained_torchao(tmp_path / "out")
    stored = load_plain(tmp_path / "out")
    _refuse_difference(model, stored, 5.0, 5.0)
    with pytest.raises(ExportError, match=r"the loss 5.1000 on a probe, and the one that was trained 5.0000"):
        _refuse_difference(model, stored, 5.0, 5.1)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(ExportError, match=r"layers.1.mlp.down_proj was saved as other numbers"):
        _refuse_difference(model, stored, 5.0, 5.0)


def test_files_that_this_machine_cannot_run_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import TorchAoConfig

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    whole(folders["wide"]).save_pretrained_torchao(tmp_path / "out", tiny.tiny_tokenizer())
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = TorchAoConfig(scheme_of("int4").config).to_dict()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="was quantized by torchao: int4 can be trained here, but neither converted"):
        load(tmp_path / "out")


def test_trained_heads_are_exported_as_they_are_trained(folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(folders["wide"], modules_to_save=["lm_head", "embed_tokens"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    model.save_pretrained_torchao(tmp_path / "out")
    torch.testing.assert_close(logits(load_plain(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)


# ---- adapters that come back ----


def test_an_adapter_comes_back_on_the_base_that_it_was_trained_on(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(folders["wide"], "phone-deployment")
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "base.json").read_text())["qat_scheme"] == "int8-int4"
    with caplog.at_level(logging.WARNING):
        again = load(tmp_path / "adapter")
    assert "the model computes as int8-int4 will, as the adapter" in caplog.text
    torch.testing.assert_close(logits(again), logits(model))
    unrounded = load(tmp_path / "adapter", load_in_16bit=True, dtype=None)
    assert facts_of(unrounded).qat is None
    again.save_pretrained_torchao(tmp_path / "out")
    torch.testing.assert_close(logits(load_plain(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)


def test_a_config_of_torchao_is_a_scheme_too(folders: dict[str, Path], tmp_path: Path) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    model = adapted(folders["wide"], config)
    assert facts_of(model).qat.name == "IntxWeightOnlyConfig"
    model.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    assert facts_of(again).qat == facts_of(model).qat
    torch.testing.assert_close(logits(again), logits(model))
    model.save_pretrained_torchao(tmp_path / "out")
    torch.testing.assert_close(logits(load_plain(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [whole, adapted])
def test_a_resumed_run_has_the_bytes_of_one_without_a_break(
    kind: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    def run(*, resume: bool = False) -> dict[str, torch.Tensor]:
        model = kind(folders["wide"])
        trainer(tmp_path, model=model, max_steps=4, save_steps=2).train(resume_from_checkpoint=resume or None)
        return {name: p.detach() for name, p in model.named_parameters()}

    first = run()
    shutil.rmtree(tmp_path / "checkpoint-4")
    second = run(resume=True)
    assert [name for name, value in second.items() if not torch.equal(value, first[name])] == []


# ---- what does not go together ----


def test_what_does_not_go_together_is_refused(folders: dict[str, Path]) -> None:
    wide = folders["wide"]
    with pytest.raises(SettingsError, match=r"qat_scheme='int9' is not known.*Did you mean 'int8'"):
        whole(wide, "int9")
    with pytest.raises(SettingsError, match="qat_scheme is a int; one of int8-int4"):
        whole(wide, 4)
    with pytest.raises(SettingsError, match="qat_scheme=int8-int4 cannot be trained here: it needs widths that are"):
        whole(folders["odd"])
    with pytest.raises(SettingsError, match="trains all weights of a base: give full_finetuning=True"):
        load(wide, qat_scheme="int8")
    with pytest.raises(ModelError, match=r"rounded already \(load_in_8bit\)"):
        whole(wide, load_in_8bit=True)
    with pytest.raises(ModelError, match=r"rounded already \(load_in_4bit\)"):
        FastLanguageModel.get_peft_model(load(wide, load_in_4bit=True), qat_scheme="int8")
    for asked in ({"lora_dropout": 0.1}, {"use_dora": True}):
        with pytest.raises(AdapterError, match=f"qat_scheme with {next(iter(asked))}: base and adapter are rounded"):
            adapted(wide, **asked)
    model = adapted(wide)
    assert FastLanguageModel.get_peft_model(model, r=4, qat_scheme="phone-deployment") is model
    with pytest.raises(SettingsError, match="qat_scheme=int8: the model trains for int8-int4 already"):
        FastLanguageModel.get_peft_model(model, r=4, qat_scheme="int8")
    with pytest.raises(SettingsError, match="qat_scheme=int8: the model trains for int8-int4 already"):
        FastLanguageModel.get_peft_model(whole(wide), qat_scheme="int8")
    with pytest.raises(SettingsError, match="torchao_config is int8, and the model was trained for int8-int4"):
        model.save_pretrained_torchao("nowhere", None, "int8")


@pytest.mark.parametrize("asked", [{"load_in_8bit": True}, {"load_in_4bit": True}, {"qat_scheme": "int8"}])
def test_other_tasks_are_refused(asked: dict[str, Any], folders: dict[str, Path]) -> None:
    with pytest.raises(NotSupportedYetError, match="with task_type='SEQ_CLS' is not supported yet"):
        load(folders["wide"], full_finetuning=True, task_type="SEQ_CLS", num_labels=3, **asked)


def test_torchao_trains_some_schemes_in_layers_that_are_not_known(folders: dict[str, Path]) -> None:
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
    from torchao.quantization import Int8WeightOnlyConfig

    with pytest.raises(SettingsError, match="torchao trains it with a MXFakeQuantizedLinear, which is not supported"):
        whole(folders["wide"], MXDynamicActivationMXWeightConfig())
    with pytest.raises(SettingsError, match="Int8WeightOnlyConfig cannot be trained here: Unexpected base config"):
        whole(folders["wide"], Int8WeightOnlyConfig())


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_run_leaves_what_it_trained_and_the_quantized_model(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    from tunesmith.training.preview import preview
    from tunesmith.training.run import run_training

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(20)), encoding="utf-8")
    asked = {
        "model": str(folders["wide"]), "data": str(rows), "output_dir": str(tmp_path / "run"), "max_steps": 2,
        "dtype": "float32", "qat_scheme": "phone-deployment", **({"full_finetuning": True} if kind == "model" else {}),
    }  # fmt: skip
    settings, _ = load_run_settings(None, asked)
    assert preview(settings).plan.peak > 0
    result = run_training(settings)
    assert result.trained == tmp_path / "run" / kind
    live = logits(result.trainer.model)
    torch.testing.assert_close(logits(load_plain(tmp_path / "run" / "torchao")), live, rtol=1e-4, atol=1e-4)
    once_more, _ = load_run_settings(tmp_path / "run" / "settings.yaml", {})
    assert once_more.qat_scheme == "phone-deployment"
    with pytest.raises(SettingsError, match="qat_scheme and load_in_4bit both round the weights"):
        load_run_settings(None, {**asked, "load_in_4bit": True})
    with pytest.raises(SettingsError, match="input should be 'int8-int4', 'phone-deployment'"):
        load_run_settings(None, {**asked, "qat_scheme": "int5"})
