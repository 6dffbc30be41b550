"""The training benchmark runs and its records are whole. Nothing here looks at a speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.ops import CASES, Case
from benchmarks.ops import measure as measure_op
from benchmarks.train import run_arm, table
from benchmarks.workload import build, load
from tests import forking

from benchmarks import train

from ..tiny import tiny_model, tiny_tokenizer

KEYS = {
    "arm", "tokens_per_s", "peak_bytes", "losses", "step_s", "commit", "versions", "device", "processor", "threads",
    "shapes", "dtype", "gemm_tflops", "gemm_share", "loss_on", "precision", "settings",
}  # fmt: skip


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model and sixteen short rows of the real ones."""
    folder = tmp_path_factory.mktemp("benchmark")
    tiny_model(initializer_range=0.02, max_position_embeddings=1024).save_pretrained(folder / "source")
    tiny_tokenizer().save_pretrained(folder / "source")
    build(folder / "workload", model=str(folder / "source"), rows=16, longest=200)
    return folder / "workload"


def job(**changes: Any) -> dict[str, Any]:
    return {"steps": 1, "warmup": 1, "loss": "answers", "device": "cpu", "dtype": "float32", **changes}


def test_rows_are_cut_and_labelled_as_the_workload_says(workload: Path) -> None:
    data = load(workload)
    answers, everything = data.rows("answers", 18), data.rows("all", 18)
    assert answers[16:] == answers[:2]  # repeated when there are too few
    for row, whole in zip(answers, everything, strict=True):
        assert 20 <= len(row["input_ids"]) == len(row["labels"]) <= 200
        trained = [label for label in row["labels"] if label >= 0]
        end = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
        assert trained.count(end) >= 1 and trained[-1] == end
        assert len(trained) < len(row["labels"]) - 1
        assert whole["labels"] == [-100, *whole["input_ids"][1:]]
    assert int(np.diff(data.offsets).max()) == data.facts["max_tokens"]


class ForkedArm:
    """Stands in for ``subprocess.Popen``: a process of its own that need not import torch first."""

    def __init__(self, call: list[str], **_: Any) -> None:
        self.ended = forking.run(call)
        self.returncode = self.ended.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        return self.ended.stdout + self.ended.stderr, None


def test_an_arm_of_ours_gives_a_whole_record(workload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.subprocess, "Popen", ForkedArm)
    record = run_arm("ours", workload=workload, **job())
    assert set(record) >= KEYS, record
    assert record["dtype"] == "float32" and record["precision"]["autocast"] is None
    assert record["tokens"] == sum(len(row["input_ids"]) for row in load(workload).rows("answers", 16)[8:])
    assert record["tokens_per_s"] > 0 and record["peak_bytes"] > 50e6
    assert len(record["losses"]) == 2 and all(np.isfinite(record["losses"]))
    assert len(record["gemm_tflops"]) == 2 and set(record["step_s"]) == {"p20", "p50", "p80"}
    # Two layers of q, k, v, o (32 and 16 wide) and of gate, up, down (56 wide), four operations a weight.
    assert record["flops_per_token"] == 2 * 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56)
    assert json.dumps(record)
    refused = {"arm": "ours-nonsense", "refused": "no policy"}
    head, first, second = table([record, refused])
    assert head.split()[0] == "arm" and first.startswith("ours") and second.endswith("refused: no policy")


def test_an_arm_that_cannot_run_says_why(workload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "refused" in run_arm("ours-nonsense", workload=workload, **job())
    assert "failed" in run_arm("theirs", workload=workload, **job())
    assert "stopped after 0 s" in run_arm("ours", workload=workload, limit_s=0.01, **job())["failed"]
    monkeypatch.setattr("benchmarks.train.PEERS", {})  # No environments of peers: this one has no litgpt.
    assert "lightning" in run_arm("litgpt", workload=workload, **job())["missing"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.op in ("rms_norm", "swiglu", "rope")], ids=lambda case: case.name
)
def test_an_op_gives_a_record(case: Case) -> None:
    record = measure_op(case, dtype="float32", device="cpu", repetitions=2)
    assert record["speedup"] > 0 and set(record["ours"]) == {"p20_s", "p50_s", "p80_s", "gb_per_s"}
