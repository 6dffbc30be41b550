"""Exports are uploaded whole, after they were compared; what would fail is said before any work begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load
from tests.export.fake_hub import TOKEN, FakeHub, fake_hub
from tests.export.support import adapt, disturb, loaded

from tunesmith.core.errors import HubError, SettingsError
from tunesmith.export import methods
from tunesmith.export.hub import Push, checked, upload
from tunesmith.export.weights import merged_weights


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that huggingface_hub asks in place of the real one."""
    from huggingface_hub import constants

    with fake_hub() as made:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", made.address)
        yield made


@pytest.fixture
def nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the export began")

    monkeypatch.setattr(methods, "export_model", refuse)


@pytest.fixture
def model(saved: Path) -> tuple[Any, Any]:
    base, tokenizer = loaded(saved)
    return disturb(adapt(base)), tokenizer


@pytest.mark.usefixtures("exports_load_here")
def test_a_merged_model_is_uploaded_as_it_was_compared(hub: FakeHub, model: tuple[Any, Any], tmp_path: Path) -> None:
    report = model[0].push_to_hub_merged("ada/cats", model[1], save_method="merged_32bit", token=TOKEN, private=True,
                                         tags=["cats"], datasets=["ada/rows"], max_shard_size="40KB",
                                         commit_message="Add cats", temporary_location=str(tmp_path))  # fmt: skip
    assert report.url == f"{hub.address}/ada/cats" and report.comparison.kl < 1e-6
    assert hub.made["ada/cats"]["visibility"] == "private" and hub.commits["ada/cats"]["summary"] == "Add cats"
    files = hub.files["ada/cats"]
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1 and {"config.json", "tokenizer.json", "README.md", "export_report.json"} <= files.keys()
    tensors = {name: value for shard in shards for name, value in load(files[shard]).items()}
    assert set(tensors) == {weight.name for weight in merged_weights(model[0], {"default": 1.0})}
    assert json.loads(files["export_report.json"])["comparisons"]["base"]["kl"] < 1e-6
    card = files["README.md"].decode()
    assert "- cats" in card and "- ada/rows" in card and "license" not in card
    assert not any(TOKEN.encode() in content or str(tmp_path).encode() in content for content in files.values())
    assert list(tmp_path.iterdir()) == []


def test_gguf_files_are_uploaded_with_their_modelfile(hub: FakeHub, model: tuple[Any, Any], tmp_path: Path) -> None:
    report = model[0].push_to_hub_gguf("ada/cats", model[1], ["f16", "Q8_0"], token=TOKEN, private=True,
                                       commit_message="Add cats", temporary_location=str(tmp_path),
                                       max_shard_size="5GB")  # fmt: skip
    assert report.url == f"{hub.address}/ada/cats" and hub.commits["ada/cats"]["summary"] == "Add cats"
    files = hub.files["ada/cats"]
    assert {"cats.F16.gguf", "cats.Q8_0.gguf", "Modelfile", "export_report.json"} <= files.keys()
    assert files["cats.F16.gguf"][:4] == b"GGUF" and b"FROM ./cats.F16.gguf" in files["Modelfile"]
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert list(tmp_path.iterdir()) == []
    adapter = model[0].save_pretrained_gguf(
        tmp_path / "kept", model[1], save_method="lora", push_to_hub=True, token=TOKEN
    )
    assert adapter.url == f"{hub.address}/ada/kept"
    assert any(name.endswith(".gguf") for name in hub.files["ada/kept"])


@pytest.mark.usefixtures("nothing_is_exported")
def test_arguments_of_gguf_that_nothing_follows_are_refused(model: tuple[Any, Any], tmp_path: Path) -> None:
    save, push = model[0].save_pretrained_gguf, model[0].push_to_hub_gguf
    with pytest.raises(
        SettingsError, match=r"maximum_memory_usage=0.99\): a share from 0 to 0.95 is taken, and one shard"
    ):
        save(tmp_path / "x", model[1], maximum_memory_usage=0.99)
    with pytest.raises(SettingsError, match=r"tags=\['a'\]\): GGUF files are written without a model card"):
        push("ada/cats", model[1], tags=["a"])
    with pytest.raises(
        TypeError, match=r"push_to_hub_gguf\(\) got an unknown argument 'quantisation_method'.*Did you mean"
    ):
        push("ada/cats", model[1], quantisation_method="f16")
    assert save(tmp_path / "x", model[1], is_main_process=False) is None
    assert push("ada/cats", model[1], is_main_process=False) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("exports_load_here")
def test_a_saved_folder_is_uploaded_too(hub: FakeHub, model: tuple[Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    report = model[0].save_pretrained_merged(folder, model[1], "lora", push_to_hub=True, token=TOKEN, create_pr=True)
    assert report.url == f"{hub.address}/ada/kept/discussions/1"
    assert hub.commits["ada/kept"]["branch"] == "refs%2Fpr%2F1" or "create_pr=1" in hub.commits["ada/kept"]["query"]
    assert hub.files["ada/kept"]["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


def test_a_folder_named_like_a_repository_goes_there() -> None:
    assert methods._repository("engines/cats") == "engines/cats"
    assert methods._repository("runs/of/cats") == methods._repository(Path("/x/cats")) == "cats"


def test_any_folder_can_be_uploaded_to_a_branch(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    push = checked(Push("engines/small", token=TOKEN, revision="q8", commit_description="smaller"))
    assert upload(tmp_path, push) == f"{hub.address}/engines/small"
    assert hub.files["engines/small"] == {"model.gguf": b"GGUF"}
    assert hub.commits["engines/small"]["branch"] == "q8"
    assert hub.commits["engines/small"]["description"] == "smaller"


@pytest.mark.usefixtures("nothing_is_exported")
def test_what_would_fail_is_said_before_the_export(
    hub: FakeHub, model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    push = model[0].push_to_hub_merged
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match=r"ada/cats cannot be uploaded without a token. Set HF_TOKEN"):
        push("ada/cats", token="")
    with pytest.raises(HubError, match=r"the hub does not take ada/cats: Invalid user token"):
        push("ada/cats", token="hf_wrong")
    with pytest.raises(HubError, match="bob/cats would belong to bob, and the token to ada, engines"):
        push("bob/cats", token=TOKEN)
    with pytest.raises(HubError, match="'ada/c ats' is no name of a repository"):
        push("ada/c ats", token=TOKEN)
    with pytest.raises(HubError, match=r"create_pr=True opens a pull request to main: leave revision='q8' out"):
        push("ada/cats", token=TOKEN, create_pr=True, revision="q8")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"the hub does not take ada/cats: .*refused"):
        push("ada/cats", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE \(or TRANSFORMERS_OFFLINE\) is set. Unset it"):
        model[0].save_pretrained_merged(tmp_path / "cats", push_to_hub=True, token=TOKEN)
    assert not (tmp_path / "cats").exists()
    assert TOKEN not in repr(Push("ada/cats", token=TOKEN))


@pytest.mark.usefixtures("nothing_is_exported")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"state_dict": {}}, "the weights are those of the model"),
        ({"save_function": print}, "only written as safetensors"),
        ({"safe_serialization": False}, "only written as safetensors"),
        ({"variant": "fp16"}, "programs look for weights under their plain names"),
        ({"save_peft_format": False}, "only written as PEFT has them"),
        ({"maximum_memory_usage": 0.99}, "one shard is held at a time: give max_shard_size"),
        ({"calibration_dataset": []}, "no method here calibrates"),
        ({"temporary_location": "x"}, "an export is written beside save_directory"),
        ({"token": "hf_x"}, "token is for uploads: give push_to_hub=True"),
        ({"create_pr": True}, "create_pr is for uploads"),
        ({"save_method": "merged_8bit"}, "use merged_16bit"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_refused(
    asked: dict[str, Any], message: str, model: tuple[Any, Any], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        model[0].save_pretrained_merged(tmp_path / "out", **asked)


def test_what_asks_for_nothing_is_taken(model: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got an unknown argument 'max_shard_sice'. Did you mean 'max_shard_size'"):
        model[0].save_pretrained_merged(tmp_path / "out", max_shard_sice="5GB")
    nothing = {"safe_serialization": True, "state_dict": None, "save_peft_format": True, "token": None}
    assert model[0].save_pretrained_merged(tmp_path / "out", is_main_process=False, **nothing) is None
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingsError, match=r"max_shard_size is for merged_16bit, .* not for save_method='lora'"):
        model[0].save_pretrained_merged(tmp_path / "out", save_method="lora", max_shard_size="1GB")
    with pytest.raises(SettingsError, match=r"use_temp_dir=False.*exported to a temporary folder"):
        model[0].push_to_hub_merged("ada/cats", use_temp_dir=False)


@pytest.mark.parametrize(("size", "count"), [("5GB", 5 * 10**9), (1000, 1000), ("2 MiB", 2**21), ("1.5kb", 1500)])
def test_sizes_are_read(size: Any, count: int) -> None:
    assert methods.bytes_of(size) == count


@pytest.mark.parametrize("size", ["big", "0", "-1GB", "5XB"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(SettingsError, match=r"is no size. Give bytes, or a text like '5GB'"):
        methods.bytes_of(size)


def test_gguf_files_that_are_saved_and_uploaded_stay_private(
    hub: FakeHub, model: tuple[Any, Any], tmp_path: Path
) -> None:
    model[0].save_pretrained_gguf(tmp_path / "kept", model[1], "f16", push_to_hub=True, token=TOKEN, private=True)
    assert hub.made["ada/kept"]["visibility"] == "private"
