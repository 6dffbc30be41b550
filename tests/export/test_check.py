"""Adapter folders with something wrong are told from those that are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.export.support import adapt, disturb, loaded

from tunesmith.core.errors import AdapterError
from tunesmith.export.check import check_adapter


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "model")
    disturb(adapt(loaded(tmp_path / "model")[0])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def problems(folder: Path) -> list[str]:
    return [finding.text for finding in check_adapter(folder) if finding.is_right is False]


def named(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def test_a_trained_adapter_is_right(adapter: Path) -> None:
    found = check_adapter(adapter)
    assert [finding.is_right for finding in found] == [True, True, True]
    assert "28 tensors fit the modules of" in found[0].text and "all 14 lora_B have left zero" in found[1].text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(named(t, "q_proj.lora_A")), "1 tensors are missing: .*q_proj.lora_A"),
        (lambda t: t.update({"base_model.model.else": torch.ones(1)}), "1 tensors fit no module of the base"),
        (lambda t: t.update({named(t, "q_proj.lora_A"): torch.ones(4, 31)}), "1 tensors have another shape"),
        (lambda t: t[named(t, "up_proj.lora_B")].zero_(), "1 of 14 lora_B are zero, as they start: .*up_proj"),
        (lambda t: [t[name].zero_() for name in t if "lora_B" in name], "every lora_B is zero"),
        (lambda t: t[named(t, "up_proj.lora_B")].fill_(float("nan")), "1 tensors hold infinite values or NaN"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[..., Any], message: str, adapter: Path) -> None:
    import re

    edit(adapter, change)
    assert any(re.search(message, problem) for problem in problems(adapter)), problems(adapter)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 24}, "rank 24: vLLM needs --max-lora-rank 32"),
        ({"use_dora": True}, "DoRA: servers like vLLM do not load that"),
        ({"modules_to_save": ["norm"]}, "modules that train whole"),
    ],
)
def test_what_servers_do_not_take_is_said(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model")
    disturb(adapt(loaded(tmp_path / "model")[0], **arguments)).save_pretrained(tmp_path / "adapter")
    found = check_adapter(tmp_path / "adapter")
    assert any(finding.is_right is None and message in finding.text for finding in found)
    assert not problems(tmp_path / "adapter")


def test_that_servers_do_not_take_trained_tokens_is_said(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tiny.save_model(tmp_path / "model")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=[3])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), config).save_pretrained(tmp_path / "it")
    assert any("tokens that were trained: servers" in finding.text for finding in check_adapter(tmp_path / "it"))


def test_a_folder_that_is_cut_short(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="corrupt or cut short"):
        check_adapter(adapter)


def test_the_command_exits_with_2_where_something_is_wrong(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tunesmith.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["check-adapter", str(adapter)])
    assert not ended.value.code and capsys.readouterr().out.startswith("ok ")
    edit(adapter, lambda t: t[named(t, "up_proj.lora_B")].zero_())
    with pytest.raises(SystemExit) as ended:
        main(["check-adapter", str(adapter)])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and "problem" in shown.out and "has 1 problem." in shown.err
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere"}))
    with pytest.raises(SystemExit) as ended:
        main(["check-adapter", str(adapter)])
    assert ended.value.code == 2 and "its base '/nowhere' is not there" in " ".join(capsys.readouterr().err.split())
