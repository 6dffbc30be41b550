"""The measurement of longer windows on a tiny model: every stage runs, is recorded once, and goes on where it ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests import tiny

from benchmarks import record, rope


def test_windows_are_scored_trained_on_and_not_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_model(tmp_path / "model")
    for module in (rope, record):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(rope, "MODEL", str(tmp_path / "model"))
    monkeypatch.setattr(rope, "NATIVE", tiny.WINDOW)
    monkeypatch.setattr(rope, "SCORED", 16)
    text = "the cat sat on a mat and saw the dog run to the red house while rain fell over every green hill "
    monkeypatch.setattr(rope, "tokens_of_text", lambda tokenizer: tokenizer(text * 400)["input_ids"])
    assert not rope.measure([1, 2, 4], 1, ["unscaled", "yarn", "llama3"], 1, minutes=0), "no time is left"
    for _ in range(2):
        assert rope.measure([1, 2, 4], 1, ["unscaled", "yarn", "llama3"], 1, minutes=5)
    lines = [json.loads(line) for line in (tmp_path / "rope.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [(line["scheme"], line["reach"], line["steps"]) for line in lines]
    untrained = [("unscaled", 1, 0), *((s, reach, 0) for reach in (2, 4) for s in ("unscaled", "yarn", "llama3"))]
    assert measured[:7] == untrained and sorted(measured[7:]) == [("llama3", 4, 1), ("yarn", 4, 1)]
    assert all(line["perplexity"] > 1 for line in lines)
    assert rope.table().splitlines()[0] == "| scheme | 1x | 2x | 4x | 4x, 1 steps at 2x |"
    monkeypatch.setattr("platform.python_version", lambda: "4.0.0")
    with pytest.raises(SystemExit, match=r"those of 4\.0\.0 differ"):
        rope.measure([1], 1, ["yarn"], 0, minutes=5)
