"""The measurement of longer windows on a tiny model: every stage runs, is recorded once, and goes on where it ended."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.conftest import ROOT

from benchmarks import record, rope


def test_windows_are_scored_trained_on_and_not_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_model(tmp_path / "model")
    for module in (rope, record):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(rope, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(rope, "MODEL", str(tmp_path / "model"))
    monkeypatch.setattr(rope, "NATIVE", tiny.WINDOW)
    monkeypatch.setattr(rope, "SCORED", 16)
    text = "the cat sat on a mat and saw the dog run to the red house while rain fell over every green hill "
    monkeypatch.setattr(rope, "tokens_of_text", lambda tokenizer: tokenizer(text * 400)["input_ids"])
    schemes = ["unscaled", "yarn", "llama3"]
    assert not rope.measure([1, 2, 4], 1, schemes, 2, minutes=0, dtype="float32"), "no time is left"
    for _ in range(2):
        assert rope.measure([1, 2, 4], 1, schemes, 2, minutes=5, dtype="float32")
    lines = [json.loads(line) for line in (tmp_path / "rope.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [(line["scheme"], line["reach"], line["steps"]) for line in lines]
    untrained = [("unscaled", 1, 0), *((s, reach, 0) for reach in (2, 4) for s in schemes)]
    assert measured[:7] == untrained and sorted(measured[7:]) == [("llama3", 4, 2), ("yarn", 4, 2)]
    assert all(line["perplexity"] > 1 for line in lines)
    own = platform.python_version(), "float32"
    assert rope.table(own).splitlines()[0] == "| scheme | 1x | 2x | 4x | 4x, 2 steps at 2x |"
    # What was measured on another text or in another dtype is neither taken over nor mixed in.
    assert rope.measure([1], 1, ["yarn"], 0, minutes=5, dtype="bfloat16")
    assert len(rope.scores((own[0], "bfloat16"))) == 1
    monkeypatch.setattr("platform.python_version", lambda: "4.0.0")
    assert rope.measure([1], 1, ["yarn"], 0, minutes=5, dtype="float32")
    assert rope.table(("4.0.0", "float32")).splitlines()[0] == "| scheme | 1x |" and len(rope.scores(own)) == 9


def test_training_ends_in_time_and_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_model(tmp_path / "model")
    monkeypatch.setattr(rope, "MODEL", str(tmp_path / "model"))
    monkeypatch.setattr(rope, "NATIVE", tiny.WINDOW)
    tokens = list(range(4, 30)) * 200
    never, always = time.monotonic() + 300, 0.0
    whole = adapter_of(rope.trained_model("yarn", tokens, 3, tmp_path / "whole", never, "float32"))
    for _ in range(2):
        assert rope.trained_model("yarn", tokens, 3, tmp_path / "parts", always, "float32") is None
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-2"]
    # The last time nothing is left to train.
    for _ in range(2):
        parts = adapter_of(rope.trained_model("yarn", tokens, 3, tmp_path / "parts", never, "float32"))
        assert whole and all(torch.equal(parts[name], part) for name, part in whole.items())


def test_text_is_the_same_in_every_process() -> None:
    code = "from benchmarks import rope; print(rope.tokens_of_text(lambda text, **_: {'input_ids': text}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop()) > 1e6


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: part for name, part in model.state_dict().items() if "lora_" in name}
