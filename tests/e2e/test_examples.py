"""Every example is valid as it stands."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from tests import tiny_vision

from tunesmith.training.settings import load_run_settings

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_settings_are_valid_and_need_no_alias(file):
    settings, aliases = load_run_settings(file, {})
    assert aliases == []
    assert settings.model == "smollm2-135m"


def test_there_is_an_example():
    assert EXAMPLES


def test_the_vision_example_teaches_a_tiny_model_to_name_colours(tmp_path, monkeypatch, capsys):
    tiny_vision.save_vision_model(tmp_path / "model", "qwen2-vl")
    words = [
        str(tmp_path / "model"),
        "--steps",
        "40",
        "--rate",
        "1e-2",
        "--dtype",
        "float32",
        "--output",
        str(tmp_path / "run"),
    ]
    monkeypatch.setattr(sys, "argv", ["vision.py", *words, "--output", str(tmp_path / "run")])
    runpy.run_path(str(FOLDER / "vision.py"), run_name="__main__")
    right = int(re.findall(r"(\d+) of 12 unseen images named rightly", capsys.readouterr().out)[0])
    assert right >= 10  # by chance 4


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.name)
def test_examples_are_short(file):
    assert len(file.read_text().splitlines()) <= 80
