"""A tiny model on disk, rows, and ``run``: a command in this process, with what it printed and its exit code."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests import tiny


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.save_model(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.chat_rows(40))


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("train", "--data", path, stdin="")``: what ``tunesmith train --data ...`` does."""
    from tunesmith.cli.main import main

    def call(*words: Any, stdin: str | bytes = "") -> Outcome:
        content = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    monkeypatch.setenv("COLUMNS", "80")
    return call


@pytest.fixture(autouse=True)
def _library_switches() -> Iterator[None]:
    """Give back what the commands switch off: the verbosity of transformers, and our logger as other tests need it."""
    import transformers

    ours = logging.getLogger("tunesmith")
    before = (ours.handlers[:], ours.level, ours.propagate)
    verbosity = transformers.logging.get_verbosity()
    yield
    ours.handlers[:], ours.level, ours.propagate = before
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def trained_run(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    from tunesmith.training.run import run_training
    from tunesmith.training.settings import load_run_settings

    folder = tmp_path_factory.mktemp("runs") / "done"
    flags = {"model": str(model_folder), "data": str(rows_file), "output_dir": str(folder), "max_steps": 2, "r": 2}
    run_training(load_run_settings(None, flags)[0])
    return folder
