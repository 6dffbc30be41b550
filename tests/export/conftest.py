from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests import tiny

from tunesmith.export import verify


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load exports in this process: another one costs seconds, and only some tests are about that."""

    def run(call: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        verify._answer(*call[3:])
        return subprocess.CompletedProcess(call, 0, "", "")

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.save_model(folder)
    return folder
