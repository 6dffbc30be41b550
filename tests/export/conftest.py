from __future__ import annotations

from pathlib import Path

import pytest
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.save_model(folder)
    return folder
