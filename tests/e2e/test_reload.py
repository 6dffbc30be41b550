"""A saved adapter is a plain PEFT folder: others load it, and so do we, with equal logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.training import support

from tunesmith import FastLanguageModel, SFTConfig, SFTTrainer
from tunesmith.core.errors import AdapterError, ModelError, TunesmithError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter folder and the logits of the model that was trained."""
    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = FastLanguageModel.from_pretrained(str(base), max_seq_length=256, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4, use_rslora=True, modules_to_save=None)
    args = SFTConfig(output_dir=str(folder / "run"), learning_rate=1e-2, max_steps=3, save_strategy="no", use_cpu=True)
    SFTTrainer(model=model, args=args, train_dataset=tiny.chat_rows(12), processing_class=tokenizer).train()
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(model)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(40, device=model.device)[None] * 7 % 300, use_cache=False).logits.cpu()


@pytest.fixture
def adapter(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    return shutil.copytree(trained[0], tmp_path / "adapter")


def test_the_folder_is_a_plain_peft_folder(trained: tuple[Path, torch.Tensor], base: Path) -> None:
    from safetensors.torch import load_file

    folder, _ = trained
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["base_model_name_or_path"], config["r"]) == ("LORA", str(base), 4)
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 2 * 7 * 2


def test_peft_alone_gives_equal_logits(trained: tuple[Path, torch.Tensor]) -> None:
    from peft import AutoPeftModelForCausalLM

    folder, expected = trained
    model = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=5e-5)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected, atol=1e-2), "the adapter must matter"


def test_our_own_loading_gives_equal_logits_and_trains_on(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = trained
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=256, dtype="float32")
    assert torch.equal(logits(model), expected)
    assert tokenizer.chat_template == tiny.tiny_tokenizer().chat_template
    before = support.trainable(model)
    assert len(before) == 28
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", use_cpu=True)
    SFTTrainer(model=model, args=args, train_dataset=tiny.chat_rows(8), processing_class=tokenizer).train()
    assert not all(torch.equal(before[name], weight) for name, weight in support.trainable(model).items())


def test_smollm2_goes_there_and_back(smollm2: Callable[[], tuple[Any, Any]], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model, tokenizer = smollm2()
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = logits(model)
    del model
    assert torch.equal(logits(FastLanguageModel.from_pretrained(str(tmp_path), dtype="float32")[0]), expected)
    plain = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    # Other attention code in each of 30 layers: equal to float32 rounding of the largest logit.
    assert float((logits(plain) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def edit_weights(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def cut(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garbage(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"\xff" * 2000)


def unknown_key(adapter: Path) -> None:
    edit_weights(
        adapter, lambda tensors: tensors.update({"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(2)})
    )


def missing_key(adapter: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[min(tensors)]

    edit_weights(adapter, change)


def wrong_shape(adapter: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = min(tensors)
        tensors[name] = torch.zeros(4, 7)

    edit_weights(adapter, change)


def bad_json(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")


def no_base(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": None}), encoding="utf-8")


def lost_base(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(adapter / "gone")}), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "adapter_model.safetensors is corrupt or cut short"),
        (garbage, "adapter_model.safetensors is corrupt or cut short"),
        (unknown_key, r"does not fit its base: 1 unknown \(base_model.model.model.layers.9"),
        (missing_key, r"does not fit its base: 1 tensors are missing \(base_model"),
        (wrong_shape, r"does not fit its base"),
        (bad_json, r"adapter_config.json is not valid JSON"),
        (no_base, r"adapter_config.json names no base model"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    ],
    ids=["cut", "garbage", "unknown key", "missing key", "wrong shape", "bad json", "no base", "no weights"],
)
def test_adapters_that_are_refused(adapter: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(adapter)
    with pytest.raises(AdapterError, match=message):
        FastLanguageModel.from_pretrained(str(adapter), max_seq_length=256)


def test_a_base_that_is_gone_is_named(adapter: Path) -> None:
    lost_base(adapter)
    with pytest.raises(ModelError, match=r"its base .*gone' is not there. Put the base back, or write its place into"):
        FastLanguageModel.from_pretrained(str(adapter), max_seq_length=256)


def test_a_file_that_is_cut_anywhere_is_never_accepted(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(TunesmithError):
            FastLanguageModel.from_pretrained(str(adapter), max_seq_length=256)
