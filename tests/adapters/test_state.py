"""One function puts base, adapter and tokenizer together; adapters whose start changed the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import tiny

from tunesmith.adapters.state import attach_adapter, load_beside, load_source, load_source_tokenizer
from tunesmith.core.errors import AdapterError
from tunesmith.models.load import facts_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny.save_model(folder)
    return folder


def save_adapter(base: Path, folder: Path, **config: Any) -> torch.Tensor:
    """Write an adapter with random B as PEFT alone does, and return the logits of the live model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.arange(40, device=model.device)[None] * 7 % 300, use_cache=False
        ).logits.cpu()


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_logits_are_those_of_the_model_that_was_trained(start: Any, base: Path, tmp_path: Path) -> None:
    live = save_adapter(base, tmp_path, init_lora_weights=start)
    model, _ = load_source(str(tmp_path), dtype="float32")
    torch.testing.assert_close(logits(model), live, rtol=0, atol=1e-4)
    assert facts_of(model).adapter is not None
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == start


def test_an_adapter_of_a_start_that_took_from_the_base_is_saved_again_as_it_was(base: Path, tmp_path: Path) -> None:
    live = save_adapter(base, tmp_path / "first", init_lora_weights="pissa")
    load_source(str(tmp_path / "first"), dtype="float32")[0].save_pretrained(tmp_path / "second")
    torch.testing.assert_close(
        logits(load_source(str(tmp_path / "second"), dtype="float32")[0]), live, rtol=0, atol=1e-4
    )


def test_the_card_beside_an_adapter_is_the_one_that_peft_writes(adapter: Path, tmp_path: Path) -> None:
    model, _ = load_source(str(adapter))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    for text in (None, "---\nlicense: mit\n---\nMine.\n"):  # one that is there is kept and added to
        if text is not None:
            for folder in (theirs, ours):
                (folder / "README.md").write_text(text, encoding="utf-8")
        PeftModel.create_or_update_model_card(model, str(theirs))
        model.save_pretrained(ours)
        assert (ours / "README.md").read_bytes() == (theirs / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("start", "reason"),
    [("pissa_niter_4", "random approximation"), ("lora_ga", "gradients"), ("corda", "statistics"),
     ("loftq", "few bits: .* or resume the run")],
)  # fmt: skip
def test_adapters_whose_base_is_lost_are_refused(start: str, reason: str, base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": start}))
    with pytest.raises(AdapterError, match=f"init_lora_weights='{start}', which .*{reason}"):
        attach_adapter(tiny.tiny_model("llama"), tmp_path)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter whose tokenizer has another chat template than its base."""
    save_adapter(base, tmp_path / "adapter")
    for file in base.glob("*token*"):
        shutil.copy(file, tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("own template")
    return tmp_path / "adapter"


def test_the_tokenizer_of_an_adapter_is_its_own(base: Path, adapter: Path) -> None:
    asked = load_source(str(adapter), chat_template="chatml")[1]
    assert asked.chat_template == tiny.tiny_tokenizer().chat_template
    ours = [load_source(str(adapter))[1], load_source(str(base), adapter=str(adapter))[1],
            load_source_tokenizer(str(adapter))[0]]  # fmt: skip
    assert [tokenizer.chat_template for tokenizer in ours] == ["own template"] * 3
    (adapter / "tokenizer_config.json").unlink()
    of_base = load_source(str(adapter))[1], load_source_tokenizer(str(adapter))[0]
    assert {tokenizer.chat_template for tokenizer in of_base} == {tiny.tiny_tokenizer().chat_template}


@pytest.mark.parametrize("asked", [None, 64])
def test_the_window_is_known_without_weights(asked: int | None, adapter: Path) -> None:
    assert load_source_tokenizer(str(adapter), max_seq_length=asked)[1] == (asked or tiny.WINDOW)
    assert facts_of(load_source(str(adapter), max_seq_length=asked)[0]).window == (asked or tiny.WINDOW)


def test_an_adapter_can_be_loaded_to_answer_only(adapter: Path) -> None:
    assert any(parameter.requires_grad for parameter in load_source(str(adapter))[0].parameters())
    answers, _ = load_source(str(adapter), trainable=False)
    assert not any(parameter.requires_grad for parameter in answers.parameters())


def test_two_adapters_or_none_are_refused(base: Path, adapter: Path) -> None:
    with pytest.raises(AdapterError, match="is no adapter: it holds no adapter_config"):
        load_source(str(base), adapter=str(base))
    with pytest.raises(AdapterError, match="already is an adapter on its base"):
        load_source(str(adapter), adapter=str(adapter))


def test_other_kinds_than_lora_are_refused(base: Path, tmp_path: Path) -> None:
    from peft import IA3Config
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(tmp_path)
    for arguments in ({"name": str(tmp_path)}, {"name": str(base), "adapter": str(tmp_path)}):
        with pytest.raises(AdapterError, match=r"is of the kind IA3; only LORA is loaded\. Merge it with PEFT"):
            load_source(**arguments)


@pytest.mark.parametrize(
    ("left", "message"), [("adapter_model.bin", "holds adapter_model.bin, a pickle"), (None, "is missing")]
)
def test_an_adapter_without_safetensors_is_refused_wherever_it_is_named(
    left: str | None, message: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    save_adapter(base, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.rename(tmp_path / left) if left else weights.unlink()
    beside: Any = load_source(str(adapter), trainable=False)[0]
    for load in (
        lambda: load_source(str(tmp_path)),
        lambda: load_source(str(base), adapter=str(tmp_path)),
        lambda: load_beside(beside, "x", tmp_path),
    ):
        with pytest.raises(AdapterError, match=message):
            load()


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_writes_text_whether_it_names_its_task_or_not(task: str | None, base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "first", task_type=task)
    model, _ = load_source(str(tmp_path / "first"), dtype="float32")
    assert model.generate(input_ids=torch.arange(5)[None] * 7, max_new_tokens=2, pad_token_id=0).shape == (1, 7)
    model.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_one_base_answers_with_one_of_several_adapters(base: Path, tmp_path: Path) -> None:
    lives = {name: save_adapter(base, tmp_path / name) for name in ("first", "second")}
    model, _ = load_source(str(tmp_path / "first"), dtype="float32", trainable=False)
    load_beside(model, "second", tmp_path / "second")
    for name, peft in (("first", "default"), ("second", "second"), ("first", "default")):
        model.set_adapter(peft)
        torch.testing.assert_close(logits(model), lives[name], rtol=0, atol=1e-4)


def test_an_adapter_beside_another_has_to_fit(base: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = load_source(str(adapter), dtype="float32", trainable=False)
    before = logits(model)
    for start, message in (("pissa", "cannot share its base"), ("pissa_niter_4", "answers would be wrong")):
        save_adapter(base, tmp_path / start, init_lora_weights=start)
        with pytest.raises(AdapterError, match=message):
            load_beside(model, "x", tmp_path / start)
    save_adapter(base, tmp_path / "cut")
    (tmp_path / "cut" / "base.json").write_text(json.dumps({"vocabulary": 400}))
    with pytest.raises(AdapterError, match="with 400 rows of vocabulary, the base has its own"):
        load_beside(model, "x", tmp_path / "cut")
    (tmp_path / "cut" / "base.json").unlink()
    stored = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    name = next(iter(stored))
    for change, message in (
        ({name: None}, r"1 tensors are missing"),
        ({f"{name}.x": stored[name].clone()}, r"1 tensors fit nothing"),
        ({name: stored[name][:, 1:].clone()}, "does not fit its base"),
    ):
        changed = {key: value.clone() for key, value in {**stored, **change}.items() if value is not None}
        save_file(changed, tmp_path / "cut" / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=message):
            load_beside(model, "x", tmp_path / "cut")
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), before)


def test_tokens_that_train_do_not_stand_beside_an_adapted_embedding(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    configs = {
        "first": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        "second": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]),
    }
    for name, config in configs.items():
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / name)
    model, _ = load_source(str(tmp_path / "first"), dtype="float32", trainable=False)
    before = logits(model)
    with pytest.raises(
        AdapterError, match=r"second does not fit its base .*: trainable_token_indices cannot be applied"
    ):
        load_beside(model, "x", tmp_path / "second")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)


def test_nothing_stands_beside_an_adapter_that_changed_its_base(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "pissa", init_lora_weights="pissa")
    save_adapter(base, tmp_path / "plain")
    model, _ = load_source(str(tmp_path / "pissa"), dtype="float32", trainable=False)
    with pytest.raises(AdapterError, match=r"cannot share its base: .*init_lora_weights='pissa'"):
        load_beside(model, "plain", tmp_path / "plain")


def test_what_an_earlier_adapter_said_of_its_base_is_gone_when_another_is_saved_there(
    base: Path, tmp_path: Path
) -> None:
    save_adapter(base, tmp_path / "first")
    model, _ = load_source(str(tmp_path / "first"), dtype="float32")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "base.json").write_text(json.dumps({"width": "4bit"}))
    model.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / "base.json").exists()
