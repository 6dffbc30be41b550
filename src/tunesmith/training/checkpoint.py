"""Checkpoints that are whole or not there, and that fit only the run that wrote them.

A checkpoint folder is written by :func:`tunesmith.core.files.whole_folder` (temporary folder, checksums, flush,
rename) and holds what transformers' Trainer reads on resume, plus ``run.json``: fingerprints of data, model and
settings. :func:`find_checkpoint` takes the newest whole one, says which damaged ones it passed over, and refuses one
that belongs to another run, naming the difference.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from tunesmith.adapters.model import base_bytes_beside
from tunesmith.core.errors import CheckpointError
from tunesmith.core.files import damage, require_space
from tunesmith.training.fingerprint import FREE

__all__ = [
    "RUN_FILE",
    "checkpoint_at",
    "checkpoint_bytes",
    "checkpoints_in",
    "find_checkpoint",
    "record_of",
    "remove_old_checkpoints",
    "require_disk_space",
]

RUN_FILE = "run.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_log = logging.getLogger(__name__)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, whole or not."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(folder: Path, run: dict[str, Any]) -> Path | None:
    """Return the newest whole checkpoint in ``folder`` that belongs to ``run``; None when there is none at all.

    Raises:
        CheckpointError: the newest whole one belongs to another run, or every one is damaged.
    """
    candidates = checkpoints_in(folder)
    for path in reversed(candidates):
        broken = damage(path)
        if broken is None:
            _check_same_run(path, run)
            return path
        _log.warning("%s is damaged (%s) and is passed over.", path, broken)
    if candidates:
        raise CheckpointError(
            f"{folder}: all {len(candidates)} checkpoints are damaged. Start the run again with another output_dir."
        )
    return None


def checkpoint_at(path: Path, run: dict[str, Any]) -> Path:
    """Return ``path``, a checkpoint that the user named.

    Raises:
        CheckpointError: it is not there, is damaged or belongs to another run.
    """
    if not path.is_dir():
        there = ", ".join(found.name for found in checkpoints_in(path.parent)) or "none"
        raise CheckpointError(f"there is no checkpoint {path}; in that folder: {there}.")
    inside = ", ".join(found.name for found in checkpoints_in(path))
    if inside:
        raise CheckpointError(
            f"{path} is the folder of a run. Name one of its checkpoints ({inside}), or resume_from_checkpoint=True to "
            "take the newest whole one of output_dir."
        )
    broken = damage(path)
    if broken is not None:
        raise CheckpointError(
            f"{path} is damaged ({broken}). Name another, or resume_from_checkpoint=True to take the newest whole one."
        )
    _check_same_run(path, run)
    return path


def _check_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Raise :class:`CheckpointError` when ``checkpoint`` was written by a run with other data, model or settings."""
    written = record_of(checkpoint)
    differences = [
        f"{part} {name}: {_short(written.get(part, {}).get(name))} then, {_short(run[part].get(name))} now"
        for part in run
        for name in sorted({*written.get(part, {}), *run[part]} - {*FREE})
        if written.get(part, {}).get(name) != run[part].get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint} belongs to another run: {'; '.join(differences)}. "
            "Use what it was started with, or start anew with another output_dir."
        )


def record_of(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run."""
    return json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def checkpoint_bytes(model: Any) -> int:
    """Return about how large a checkpoint is: trained weights, two optimizer moments, tokenizer and small files."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Moments are float32 also beside 16-bit weights.
    return sum(parameter.numel() * (parameter.element_size() + 8) for parameter in trainable) + 8 * 2**20


def require_disk_space(model: Any, folder: Path) -> None:
    """Raise :class:`OutputError` when the disk of ``folder`` has no room for what a run writes."""
    beside = base_bytes_beside(model)
    what = "keeping checkpoints" if beside == 0 else "keeping checkpoints and the base of the adapter"
    require_space(folder, 3 * checkpoint_bytes(model) + beside, what)


def remove_old_checkpoints(written: Path, *, keep: int | None, best: str | None) -> None:
    """Delete all but the newest ``keep`` checkpoints up to the one just ``written``, and the best.

    None keeps all, and so does a number below 1, as in transformers.

    A later one is left from before the run was resumed. It may be damaged and does not count: it is written anew when
    its step comes.
    """
    folder, step = written.parent, _step(written)
    # What a crash left: checkpoints half written or half removed. The caller has just written one, so none is in use.
    for stale in folder.glob(".checkpoint-*.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    if keep is None or keep < 1:
        return
    for path in [path for path in checkpoints_in(folder) if _step(path) <= step][:-keep]:
        if best is None or path.name != Path(best).name:
            # Renamed first, so that a crash in the middle leaves no half checkpoint under its name.
            doomed = path.with_name(f".{path.name}.partial-removed")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
