from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.training.run import run_training
from tunesmith.training.settings import RunSettings


@pytest.fixture(scope="module")
def run_folder(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    settings: dict[str, Any] = {"model": str(model_folder), "data": str(rows_file), "max_steps": 2, "r": 4,
                                "dtype": "float32", "learning_rate": 0.05, "eval_split": 0,
                                "output_dir": str(tmp_path_factory.mktemp("runs") / "run")}  # fmt: skip
    return run_training(RunSettings(**settings)).folder


def test_the_command_says_how_near_the_export_is(run_folder: Path, tmp_path: Path, run: Any) -> None:
    outcome = run("export", run_folder, "--output", tmp_path / "out", "--method", "merged_32bit", "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert "loaded by transformers in another process" in shown and "(4 training rows)" in shown
    assert "KL divergence" in shown and "MiB of float32" in shown
    assert max(len(line) for line in outcome.out.splitlines() if str(tmp_path) not in line) <= 80
    report = json.loads((tmp_path / "out" / "export_report.json").read_text(encoding="utf-8"))
    assert report["comparisons"]["base"]["kl"] <= 1e-6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "new", "--method", "merged_16bits"), "Did you mean 'merged_16bit'"),
        (("--output", "."), "is there already and is not overwritten"),
        (("--output", "new", "--adapter", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_said_in_a_sentence(words: tuple[str, ...], message: str, run_folder: Path, run: Any) -> None:
    outcome = run("export", run_folder, *words)
    assert outcome.code == 2 and message in " ".join(outcome.err.split())
    assert not Path("new").exists()
