"""Adapters on tensors of experts: trained, saved, loaded and merged as those of linear layers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.adapters.inject import inject_adapter
from tunesmith.adapters.settings import AdapterSettings
from tunesmith.adapters.state import empty_source
from tunesmith.core.errors import AdapterError
from tunesmith.training.settings import load_run_settings

from ..training.support import trainer

FAMILIES = ["mixtral", "qwen3-moe", "gpt-oss"]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp("experts") / family
        tiny.save_model(made[family], family)
    return made


def load(folder: Path, **arguments: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=256, **{"dtype": "float32", **arguments})[0]


def adapt(folder: Path, **arguments: Any) -> Any:
    return FastLanguageModel.get_peft_model(load(folder), **{"r": 4, "target_parameters": BOTH, **arguments})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.arange(40, device=model.device)[None] * 7 % 300, use_cache=False
        ).logits.cpu()


@pytest.mark.parametrize("modules", [None, []], ids=["with linear layers", "alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_saved_loaded_and_merged(family: str, modules: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, before = adapt(folders[family], target_modules=modules), logits(load(folders[family]))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(".experts." in name for name in trained)
    assert any("q_proj" in name for name in trained) == (modules is None)
    started = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(tmp_path / "run", model=model, max_steps=3, learning_rate=1e-2)
    run.train()
    # Every matrix learned, and nothing else changed.
    for name, p in model.named_parameters():
        assert torch.equal(p, started[name]) != (name in trained), name
    live = logits(model)
    assert (live - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    near = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(logits(load(tmp_path / "adapter")), live, **near)
    base = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), live, **near)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, **near)
    torch.testing.assert_close(logits(model.merge_and_unload()), live, **near)


def test_sixteen_bits_train_in_float32(folders: dict[str, Path]) -> None:
    base = load(folders["mixtral"], dtype="bfloat16")
    model = FastLanguageModel.get_peft_model(base, r=4, target_parameters=BOTH)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(input_ids=torch.arange(20)[None], use_cache=False).logits.float().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_a_resumed_run_has_the_bytes_of_one_without_a_break(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    def run(*, resume: bool = False) -> dict[str, torch.Tensor]:
        model = adapt(folders["mixtral"])
        trainer(tmp_path, model=model, max_steps=4, save_steps=2).train(resume_from_checkpoint=resume or None)
        return {name: p.detach() for name, p in model.named_parameters()}

    whole = run()
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert all(torch.equal(value, whole[name]) for name, value in run(resume=True).items())


def test_ranks_and_layers_by_name(folders: dict[str, Path]) -> None:
    one = "model.layers.1.mlp.experts.down_proj"
    model = adapt(folders["mixtral"], target_parameters=[one], target_modules=[], rank_pattern={"down_proj": 2})
    names = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert all("layers.1.mlp.experts" in name for name in names)
    assert {shape[0] for name, shape in names.items() if "lora_A" in name} == {2 * 4}, "four experts of rank 2"


def test_the_same_call_again_returns_the_model(folders: dict[str, Path]) -> None:
    model = adapt(folders["mixtral"])
    assert FastLanguageModel.get_peft_model(model, r=4, target_parameters=BOTH[::-1]) is model
    with pytest.raises(AdapterError, match="target_parameters: "):
        FastLanguageModel.get_peft_model(model, r=4, target_parameters=BOTH[:1])


def test_shapes_alone_can_be_planned(folders: dict[str, Path]) -> None:
    from tunesmith.memory import shape_of

    empty, _ = empty_source(str(folders["mixtral"]), dtype="float32")
    model = inject_adapter(empty, AdapterSettings(r=4, target_parameters=BOTH))
    shape = shape_of(model)
    assert shape.trained == shape_of(adapt(folders["mixtral"])).trained
    assert shape.rebuilt == 4 * (4 * 112 * 32 + 4 * 32 * 56), "the two tensors of a layer with adapters, float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_parameters": ["experts.dwn_proj"]}, "It has: experts.gate_up_proj, experts.down_proj. Did you mean"),
        ({"target_parameters": ["q_proj.weight"]}, "Linear layers are named in target_modules"),
        ({"lora_dropout": 0.1}, "lora_dropout does not go with target_parameters: the adapter is added to the tensor"),
        ({"use_dora": True}, "use_dora does not go with target_parameters: PEFT has no DoRA for them"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights does not go .*they start with true, false or gaussian"),
        ({"loftq_config": {"loftq_bits": 4}}, "init_lora_weights does not go with target_parameters"),
        ({"finetune_last_n_layers": 1}, "layers_to_transform does not go with .*name the tensors of these layers"),
        ({"target_modules": [], "target_parameters": None}, "target_modules is empty"),
    ],
)
def test_what_does_not_go_with_experts(arguments: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(AdapterError, match=message):
        adapt(folders["mixtral"], **arguments)


def test_a_model_without_experts_says_so() -> None:
    with pytest.raises(AdapterError, match=r"matched no tensor of experts of LlamaForCausalLM\. It has none"):
        FastLanguageModel.get_peft_model(tiny.tiny_model("llama"), target_parameters=["mlp.experts.down_proj"])


def test_a_run_says_what_it_adapts(folders: dict[str, Path]) -> None:
    from tunesmith.cli.report import _adapters

    settings, _ = load_run_settings(None, {"model": "m", "data": "d", "target_parameters": BOTH})
    assert settings.target_parameters == BOTH
    ((_, line),) = _adapters(adapt(folders["mixtral"]))
    assert line.endswith("on k_proj, o_proj, q_proj, v_proj, mlp.experts.down_proj, mlp.experts.gate_up_proj")
