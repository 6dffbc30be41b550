"""Prediction and measurement side by side, every run in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.memory import CONFIGURATIONS, measure, name_of

from tunesmith.memory.plan import UNSLOTH_SHARE

QUICK: tuple[dict[str, Any], ...] = (
    {"model": "tiny", "mode": False, "batch": 1, "length": 1024, "r": 16},
    {"model": "tiny", "mode": "selective", "batch": 4, "length": 200, "r": 64, "vary": True, "trained": 0.2},
)


def compare(spec: dict[str, Any]) -> dict[str, Any]:
    found = measure(spec)
    ratio = found["predicted"] / found["measured"]
    assert 0.95 <= ratio <= 1.10, f"{name_of(spec)}: {ratio:.3f} of the measured peak was predicted; {found['parts']}"
    return found


@pytest.mark.parametrize("spec", QUICK, ids=name_of)
def test_prediction_of_a_small_run(spec: dict[str, Any]) -> None:
    compare(spec)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("spec", CONFIGURATIONS, ids=name_of)
def test_prediction(spec: dict[str, Any]) -> None:
    compare(spec)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "spec",
    [
        {"model": "smollm2-135m", "batch": 4, "length": 512, "r": 16},
        {"model": "qwen3-0.2b", "batch": 8, "length": 256, "r": 16},
    ],
    ids=lambda spec: spec["model"],
)
def test_unsloth_needs_less_than_its_share_of_transformers(spec: dict[str, Any]) -> None:
    theirs = measure({**spec, "arm": "transformers"})["measured"]
    ours = compare({**spec, "mode": "unsloth"})
    assert ours["measured"] <= UNSLOTH_SHARE * theirs
    assert ours["predicted"] <= UNSLOTH_SHARE * theirs
