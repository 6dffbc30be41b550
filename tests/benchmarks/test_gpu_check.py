"""The GPU check itself, at toy sizes on a CPU: every stage, the tables and the records. Nothing here is about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import ROOT

from benchmarks import gpu_check

pytestmark = pytest.mark.slow

STAGES = ["parity", "ceilings", "8b", "unsloth", "4b", "135m", "graphs", "curve"]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_GPU_OUT", str(tmp_path / "out"))
    return tmp_path / "out" / "gpu_check.jsonl"


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_every_stage_runs_dry(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = gpu_check.main(["--dry-run-cpu"])
    printed, records = capsys.readouterr().out, read(out)
    assert code == 0, printed
    assert list(dict.fromkeys(record["stage"] for record in records)) == STAGES
    for record in records:
        assert record["dry_run"] and record["device"] == "cpu"
        assert record.keys() >= {"date", "commit", "processor", "versions"}

    assert all(record["passes"] for record in records if record["stage"] == "parity")
    assert {r["op"] for r in records if r["stage"] == "parity"} >= {
        "rms_norm", "rope", "swiglu", "linear_cross_entropy", "attention_varlen", "float8", "float8 products",
    }  # fmt: skip
    ceilings = [record for record in records if record["stage"] == "ceilings"]
    assert len(ceilings) > 15 and all(r.get("gb_per_s", 0) > 0 or r.get("tflops", 0) > 0 for r in ceilings)

    checks = [record for record in records if record.get("op") == "CUDA graph"]
    assert len(checks) == 2 and all(record["passes"] and record["graphs"]["replayed"] for record in checks)
    short = [record for record in records if record["stage"] == "graphs" and "tokens_per_s" in record]
    assert [record["arm"] for record in short] == ["hf", "ours-none", "ours-none-graphs"]
    assert short[2]["losses"] == pytest.approx(short[1]["losses"], rel=1e-5) and len(short[2]["losses"]) == 8
    assert short[2]["graphs"]["replayed"] > 0 and not short[2]["notes"]

    arms = [record for record in records if "tokens_per_s" in record and record["stage"] != "graphs"]
    (in_float8,) = (record for record in arms if record["arm"].endswith("-fp8"))
    arms.remove(in_float8)
    assert in_float8["float8"] == "stored, and not multiplied: cpu does not multiply float8"
    assert in_float8["losses"] == pytest.approx(arms[0]["losses"], rel=1e-2) and not in_float8["notes"]
    in_4bit = [record for record in arms if record["arm"].endswith("-nf4")]
    arms = [record for record in arms if record not in in_4bit]
    assert [record["arm"] for record in in_4bit] == ["hf-nf4", "ours-none-nf4", "ours-sel_min-nf4"]
    assert all(record["losses"] == pytest.approx(in_4bit[0]["losses"], rel=1e-4) for record in in_4bit)
    assert in_4bit[0]["losses"] == pytest.approx(arms[0]["losses"], rel=1e-2) != pytest.approx(arms[0]["losses"])
    policies = {record["arm"] for record in arms if record["model"] == "toy-llama"}
    assert policies == {"hf", "hf-nockpt", *(f"ours-{p}" for p in ("none", "sel_mlp", "sel_min", "full", "offload"))}
    for model in ("toy-llama", "toy-qwen3", "toy-small"):
        own = [record for record in arms if record["model"] == model]
        for record in own:
            assert record["losses"] == pytest.approx(own[0]["losses"], rel=1e-4), record["arm"]
            assert record["tokens_per_s"] > 0 and record["flops_per_token"] > 0
            layers = 3 if model == "toy-small" else 2
            if record["arm"].startswith("ours"):
                assert record["policies"] == {record["arm"].removeprefix("ours-"): layers} and not record["notes"]
        # What the engine changed is gone again when transformers runs last.
        assert own[-1]["repeats"] == (own[-1]["arm"] == "hf")
    assert len(arms[0]["losses"]) == 3 and arms[0]["losses"][0] != arms[0]["losses"][1]

    (curve,) = (record for record in records if record["stage"] == "curve")
    assert curve["largest_difference"] < 1e-4 and curve["adapter_cosine"] > 0.999
    missing = [record for record in records if record["stage"] == "unsloth"]
    assert [record["arm"] for record in missing] == ["unsloth-max", "unsloth", "unsloth-max-nf4", "unsloth-nf4"]
    for text in ("kernels against float64", "ceilings and kernels", "toy-qwen3, dense 1 x 24", "4 steps of toy-llama"):
        assert text in printed
    for record in missing:
        if "missing" in record:
            assert f"missing: {record['missing']}" in printed


def test_a_stage_for_which_no_time_is_left_is_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--dry-run-cpu", "--minutes", "0.01", "--stages", "4b"]) == 1
    assert read(out) == [{"stage": "4b", "failed": "no time was left"}]
    assert "stage 4b failed: no time was left" in capsys.readouterr().out


def test_a_stage_that_crashes_is_named(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert gpu_check.main(["--dry-run-cpu", "--stages", "parity,curve"]) == 1
    assert read(out) == [{"stage": "parity,curve", "failed": "exit code 1"}]
    assert "stage parity,curve failed: exit code 1" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "gpu-check cannot run here: torch sees no CUDA device (--dry-run-cpu tests the script itself).\n"
    )


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--stages", "8b,9b"])
    assert "no stage 9b; there are parity, ceilings" in capsys.readouterr().err


def test_what_counts_as_wrong() -> None:
    def wrong(**facts: Any) -> bool:
        return gpu_check._is_wrong({"stage": "8b", **facts})

    assert wrong(passes=False) and wrong(failed="TypeError: no")
    assert not wrong(passes=True) and not wrong(missing="no time was left") and not wrong(tokens_per_s=1.0)
    assert not wrong(failed="out of memory: tried to allocate") and not wrong(stage="unsloth", failed="TypeError: no")


def test_a_wrong_kernel_is_named_in_the_table() -> None:
    good = {"rms": 1.0, "allowed": 2.0, "worst": 1.0, "worst_allowed": 2.0}
    base = {"stage": "parity", "op": "rope", "dtype": "bfloat16"}
    lines = gpu_check._parity_lines(
        [
            {**base, "case": "rotate", "passes": True, "results": {"out": good}},
            {**base, "case": "rotate back", "passes": False, "results": {"out": {**good, "worst": 9.0}}},
            {**base, "case": "norm_rotate", "passes": False, "failed": "AssertionError: written behind a row"},
        ]
    )
    assert "1/3" in lines[2]
    assert "rotate back, bfloat16: {'out'" in lines[3] and "written behind a row" in lines[4]


def test_every_arm_runs_without_what_such_a_machine_may_lack(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
sys.modules.update(dict.fromkeys(("pydantic", "typer", "datasets")))
from benchmarks.gpu import arms
from benchmarks.gpu.stage import Stage
arms.headline(Stage("8b", True, time.time() + 200, Path({str(tmp_path / "out")!r})), "toy-llama")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    arms = [record["arm"] for record in read(tmp_path / "out") if "tokens_per_s" in record]
    assert {"hf", "ours-none", "ours-none-fp8", "ours-none-nf4"} <= set(arms)
