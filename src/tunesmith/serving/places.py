"""Which folders adapters may be read from, and which files: nothing outside what is allowed, and no pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.core.errors import AdapterError
from tunesmith.models.aliases import find_model

__all__ = ["adapter_inside", "require_adapter"]

_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def adapter_inside(path: str, roots: Sequence[Path]) -> Path:
    """Return the adapter folder that ``path`` means; every file of it lies inside one of ``roots``, links followed.

    Args:
        path: an absolute path, or one that begins at a root.

    Raises:
        AdapterError: it leads outside, or there is no adapter; what lies outside is not looked at.
    """
    roots = [root.resolve() for root in roots]
    outside = AdapterError("the path leads outside of the folders that adapters may be loaded from.")
    try:
        places = [place.resolve() for root in roots if _is_inside(place := root / path, roots)]
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a zero byte
        raise AdapterError(f"the path cannot be read: {error}.") from None
    if not places:
        raise outside
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        raise AdapterError(f"there is no folder {path}.")
    folder = require_adapter(str(place)).resolve()
    if not all(_is_inside(entry, roots) for entry in (folder, *folder.rglob("*"))):
        raise outside
    return folder


def require_adapter(name: str) -> Path:
    """Return the folder of the adapter that ``name`` means: its own, or that of a run.

    Raises:
        ModelError: nothing is there.
        AdapterError: it holds no adapter, or its weights are not safetensors.
    """
    source = find_model(name)
    if source.kind != "adapter":
        raise AdapterError(f"{name} holds no adapter (adapter_config.json). Give a run's or adapter's folder.")
    folder = Path(source.path)
    if not (folder / _WEIGHTS).is_file():
        pickle = next((file.name for file in sorted(folder.iterdir()) if file.suffix in _PICKLES), None)
        if pickle is not None:
            raise AdapterError(
                f"{name} holds {pickle}, a pickle, which can run code when it is read: only {_WEIGHTS} is read. Load "
                "it where it was trained and save it with save_pretrained."
            )
        raise AdapterError(f"{name}: {_WEIGHTS} is missing. Copy the adapter again.")
    return folder


def _is_inside(place: Path, roots: Sequence[Path]) -> bool:
    return any(place.resolve().is_relative_to(root) for root in roots)
