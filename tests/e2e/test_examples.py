"""Every example is valid as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.training.settings import load_run_settings

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_settings_are_valid_and_need_no_alias(file):
    settings, aliases = load_run_settings(file, {})
    assert aliases == []
    assert settings.model == "smollm2-135m"


def test_there_is_an_example():
    assert EXAMPLES
