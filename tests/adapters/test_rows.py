"""Starts that look at rows: what they start with is what their papers say, and rows are never missing in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.adapters.rows import as_rows
from tunesmith.core.errors import AdapterError, DataError, SettingsError
from tunesmith.engine.install import engine_of
from tunesmith.models.load import facts_of
from tunesmith.training.settings import load_run_settings

FROM_ROWS = ["eva", "corda", "lora_ga"]
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "model"
    tiny.save_model(folder)
    return folder


def load(base: Path, **arguments: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(base), max_seq_length=256, **{"dtype": "float32", **arguments})[0]


def adapt(base: Path, start: Any, rows: Any = 16, **arguments: Any) -> Any:
    data = tiny.chat_rows(rows) if isinstance(rows, int) else rows
    return FastLanguageModel.get_peft_model(load(base), r=4, init_lora_weights=start, init_data=data, **arguments)


def layer_of(model: Any) -> Any:
    return model.get_base_model().get_submodule(LAYER)


def inputs_and_gradient(base: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what goes into a layer of the base over all rows, a document at a time, and the gradient of its weight."""
    model, seen = load(base), []
    layer = model.get_submodule(LAYER)
    layer.weight.requires_grad_(True)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()[0]))
    documents = as_rows(model, tiny.chat_rows(16)).documents
    loss = torch.zeros(())
    for document in documents:
        ids = torch.tensor(document.input_ids).long()
        labels = torch.where(torch.tensor(document.trained), ids, -100)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = loss + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    loss.backward()
    return torch.cat(seen), layer.weight.grad


def angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the cosines of the angles between the spaces that the rows of ``a`` and ``b`` span."""
    return torch.linalg.svdvals(torch.linalg.qr(a.double().T)[0].T @ torch.linalg.qr(b.double().T)[0])


def test_eva_holds_the_principal_directions_of_the_inputs(base: Path) -> None:
    layer, (x, _) = layer_of(adapt(base, "eva")), inputs_and_gradient(base)
    wanted = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
    torch.testing.assert_close((layer.lora_A["default"].weight * wanted).sum(1).abs(), torch.ones(4), atol=1e-3, rtol=0)
    assert not layer.lora_B["default"].weight.any()
    assert torch.equal(layer.get_base_layer().weight, load(base).get_submodule(LAYER).weight)


def test_corda_takes_the_largest_directions_that_inputs_reach(base: Path) -> None:
    layer, (x, _), weight = layer_of(adapt(base, "corda")), inputs_and_gradient(base), load(base).get_submodule(LAYER)
    moments = (x.T @ x / len(x)).double()
    moments += 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
    u, s, v = torch.linalg.svd(weight.weight.double() @ moments)
    wanted = (u[:, :4] * s[:4]) @ v[:4] @ torch.linalg.inv(moments)
    low = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(low, wanted.float(), rtol=1e-2, atol=1e-3)


def test_lora_ga_holds_directions_of_the_gradient(base: Path) -> None:
    layer, (_, gradient) = layer_of(adapt(base, "lora_ga")), inputs_and_gradient(base)
    u, _, v = torch.linalg.svd(gradient)
    assert angles(layer.lora_A["default"].weight, v[:4]).min() > 0.99
    assert angles(layer.lora_B["default"].weight.T, u[:, 4:8].T).min() > 0.98


@pytest.mark.parametrize("start", FROM_ROWS)
def test_rows_decide_and_nothing_else(start: str, base: Path) -> None:
    def first(rows: Any, seed: int = 3407) -> torch.Tensor:
        return layer_of(adapt(base, start, rows, random_state=seed)).lora_A["default"].weight.detach()

    one = first(16)
    assert torch.equal(one, first(16))
    assert angles(one, first(tiny.chat_rows(16, seed=1))).min() < 0.99
    assert angles(one, first(16, seed=1)).min() > 0.99


@pytest.mark.parametrize("start", FROM_ROWS)
def test_looking_leaves_no_trace(start: str, base: Path) -> None:
    model = adapt(base, start, modules_to_save=["lm_head"])
    assert engine_of(model).notes == [] and model.training
    # On attention transformers leaves hooks of its own.
    modules = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, LoraLayer))]
    assert not any(module._forward_hooks or module._backward_hooks for module in modules)
    assert not any(hasattr(module, "eigens") or hasattr(module, "_peft_loraga_grad") for module in modules)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert all(p.grad is None for p in model.parameters())


def test_rows_of_any_kind_give_the_same(base: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = tiny.chat_rows(16)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    wanted = layer_of(adapt(base, "eva")).lora_A["default"].weight
    for source in (str(file), Dataset.from_list(rows), as_rows(load(base), rows)):
        assert torch.equal(layer_of(adapt(base, "eva", source)).lora_A["default"].weight, wanted)


def test_a_quantized_base_can_be_looked_at(base: Path) -> None:
    model = FastLanguageModel.get_peft_model(
        load(base, load_in_4bit=True), r=4, init_lora_weights="eva", init_data=tiny.chat_rows(16)
    )
    a = layer_of(model).lora_A["default"].weight.cpu()
    torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-4)


def test_the_same_call_again_returns_the_model(base: Path) -> None:
    asked: dict[str, Any] = {"r": 4, "init_lora_weights": "eva", "init_data": tiny.chat_rows(16)}
    model = FastLanguageModel.get_peft_model(load(base), **asked)
    assert FastLanguageModel.get_peft_model(model, **asked) is model
    with pytest.raises(AdapterError, match="init_data: "):
        FastLanguageModel.get_peft_model(model, **{**asked, "init_data": tiny.chat_rows(16, seed=1)})


@pytest.mark.parametrize("start", FROM_ROWS)
def test_without_rows_there_is_no_such_start(start: str, base: Path) -> None:
    with pytest.raises(AdapterError, match=f"init_lora_weights='{start}' starts from rows of data: give init_data"):
        adapt(base, start, None)
    with pytest.raises(SettingsError, match=f"init_lora_weights='{start}' starts from rows of data: give init_data"):
        load_run_settings(None, {"model": "m", "data": "d", "init_lora_weights": start})


def test_rows_that_are_of_no_use(base: Path) -> None:
    with pytest.raises(AdapterError, match="init_data is looked at by eva, corda and lora_ga, and not by"):
        adapt(base, True)
    with pytest.raises(SettingsError, match="init_data is looked at by init_lora_weights eva, corda and lora_ga alone"):
        load_run_settings(None, {"model": "m", "data": "d", "init_data": "d"})
    with pytest.raises(DataError):
        adapt(base, "eva", [])
    with pytest.raises(AdapterError, match=r"init_data has \d+ tokens, and a rank of 30 needs as many"):
        adapt(base, "eva", [{"text": "the cat"}], rank_pattern={"q_proj": 30})
    with pytest.raises(AdapterError, match=r"takes 40 directions of .*q_proj at rank 20"):
        adapt(base, "lora_ga", rank_pattern={"q_proj": 20})
    for start in FROM_ROWS:
        with pytest.raises(AdapterError, match="embeddings and heads do not start in this way"):
            adapt(base, start, target_modules=["q_proj", "lm_head"])
    rows = tiny.chat_rows(2)
    with pytest.raises(AdapterError, match="a quantized base would be rounded again"):
        FastLanguageModel.get_peft_model(load(base, load_in_4bit=True), init_lora_weights="corda", init_data=rows)
    with pytest.raises(AdapterError, match="this model came without its tokenizer"):
        FastLanguageModel.get_peft_model(tiny.tiny_model(), init_lora_weights="eva", init_data=rows)


def test_a_run_starts_from_its_rows(base: Path, tmp_path: Path) -> None:
    from tunesmith.training.preview import preview
    from tunesmith.training.run import make_trainer

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, tiny.chat_rows(16))), encoding="utf-8")
    asked = {"model": str(base), "data": str(rows), "max_seq_length": 256, "dtype": "float32", "r": 4,
             "init_lora_weights": "eva", "init_data": str(rows)}  # fmt: skip
    settings, _ = load_run_settings(None, asked)
    assert preview(settings).plan.peak > 0
    model = make_trainer(settings, tmp_path / "run")[0].model
    assert torch.equal(layer_of(model).lora_A["default"].weight, layer_of(adapt(base, "eva")).lora_A["default"].weight)
    assert facts_of(model).adapter["init_data"]
