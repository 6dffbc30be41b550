"""A run that is killed and resumed ends with the same bytes as one that nobody touched.

The processes really die by SIGKILL: at random moments, and while a checkpoint is being written. See ``_victim.py``
for how a kill costs a second instead of an import of torch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT
from tests.training import support
from tests.training._victim import STEPS

KILLS = 10


class Victim:
    """A process that imports everything once and forks a child for each run."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training._victim"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, folder: Path, *, model: str = "tiny", resume: bool = False, **kill: Any) -> dict[str, Any]:
        """Train in ``folder`` in a fresh child; return its exit status and what it left."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"folder": str(folder), "model": model, "resume": resume, "kill": kill or None}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    process = Victim()
    yield process
    process.close()


def log_of(folder: Path) -> str:
    return folder.with_name(folder.name + ".log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def uninterrupted(victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nobody touched, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    answer = victim.run(folder)
    assert answer["status"] == 0, log_of(folder)
    return folder, answer["seconds"]


def test_ten_kills_change_no_byte(victim: Victim, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    straight, seconds = uninterrupted
    folder = tmp_path / "run"
    draw = random.Random(11)
    killed = in_checkpoint = 0
    for attempt in range(KILLS):
        # Every other kill waits until the writing of a checkpoint has begun, the rest strike anywhere.
        kill = (
            {"in_checkpoint": draw.randint(1, 3), "after_s": draw.uniform(0, 0.01)}
            if attempt % 2
            else {"after_s": draw.uniform(0.1, 0.25) * seconds}
        )
        answer = victim.run(folder, resume=attempt > 0, **kill)
        assert answer["status"] in (-signal.SIGKILL, 0), log_of(folder)
        killed += answer["status"] != 0
        in_checkpoint += answer["partial"]
    assert killed >= KILLS - 2, "the run ended before the kills: make it longer"
    assert in_checkpoint >= 2, "no kill struck while a checkpoint was written"
    answer = victim.run(folder, resume=True)
    assert answer["status"] == 0, log_of(folder)
    assert_same_run(folder, straight)


def assert_same_run(folder: Path, straight: Path) -> None:
    for file in ("adapter/adapter_model.safetensors", f"checkpoint-{STEPS}/adapter_model.safetensors",
                 f"checkpoint-{STEPS}/optimizer.pt", f"checkpoint-{STEPS}/rng_state.pth"):  # fmt: skip
        assert support.digest(folder / file) == support.digest(straight / file), file
    assert without_mean(support.metrics(folder)) == without_mean(support.metrics(straight))
    # Nothing half written is left, and nothing more than the uninterrupted run keeps.
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in straight.iterdir())


def without_mean(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the value of the Trainer's last line: the mean loss over the steps of the last process alone."""
    return [{**line, "train_loss": None} if "train_loss" in line else line for line in lines]


def test_resuming_a_finished_run_changes_nothing(
    victim: Victim, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    import shutil

    straight, _ = uninterrupted
    folder = shutil.copytree(straight, tmp_path / "run")
    answer = victim.run(folder, resume=True)
    assert answer["status"] == 0, log_of(folder)
    assert_same_run(folder, straight)


def test_ctrl_c_saves_and_the_run_can_go_on(victim: Victim, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    straight, _ = uninterrupted
    folder = tmp_path / "run"
    answer = victim.run(folder, in_checkpoint=3, after_s=0.02, signal=signal.SIGINT)
    assert answer["status"] == 0, log_of(folder)
    assert "Stopping after this step; the state is saved" in log_of(folder)
    stopped_at = max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
    assert 3 <= stopped_at < STEPS
    answer = victim.run(folder, resume=True)
    assert answer["status"] == 0, log_of(folder)
    name = "adapter/adapter_model.safetensors"
    assert support.digest(folder / name) == support.digest(straight / name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_change_no_byte_of_smollm2(victim: Victim, tmp_path: Path) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "run"
    answer = victim.run(straight, model="smollm2")
    assert answer["status"] == 0, log_of(straight)
    draw = random.Random(12)
    for attempt in range(KILLS):
        kill = {"in_checkpoint": draw.randint(1, 3), "after_s": draw.uniform(0, 0.3)}
        if attempt % 2:
            kill = {"after_s": draw.uniform(0.05, 0.2) * answer["seconds"]}
        assert victim.run(folder, model="smollm2", resume=attempt > 0, **kill)["status"] in (-signal.SIGKILL, 0)
    assert victim.run(folder, model="smollm2", resume=True)["status"] == 0, log_of(folder)
    name = "adapter/adapter_model.safetensors"
    assert support.digest(folder / name) == support.digest(straight / name)
