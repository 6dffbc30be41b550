"""A run that is killed and resumed ends with the same bytes as one that nobody touched.

The processes really die by SIGKILL: at random moments, and while a checkpoint is being written.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tests import forking
from tests.training import _victim, support
from tests.training._victim import STEPS

KILLS = 6
"""Of the tiny run; the real one is killed ten times."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status (negative: the signal), and whether it left a half written checkpoint."""

    status: int | None
    seconds: float
    partial: bool


def run(folder: Path, *, model: str = "tiny", resume: bool = False, **kill: Any) -> Ended:
    """Train in ``folder`` in a process of its own.

    ``kill`` is when SIGKILL (or ``signal``) is sent: ``after_s`` seconds after the start, or after the
    ``in_checkpoint``-th partial checkpoint folder appeared.
    """
    process = forking.start(_victim.train, folder, model, resume, out=log_file(folder))
    began = time.monotonic()
    assert process.pid is not None
    if kill and ("in_checkpoint" not in kill or saw_partial(process, folder, kill["in_checkpoint"])):
        time.sleep(kill["after_s"])
        with suppress(ProcessLookupError):
            os.kill(process.pid, kill.get("signal", signal.SIGKILL))
    process.join()
    partial = any(folder.glob(".checkpoint-*.partial-*"))
    return Ended(process.exitcode, time.monotonic() - began, partial)


def saw_partial(process: BaseProcess, folder: Path, count: int) -> bool:
    """Return whether ``count`` different partial checkpoints were seen before the process ended."""
    seen: set[str] = set()
    while len(seen) < count:
        seen |= {path.name for path in folder.glob(".checkpoint-*.partial-*")}
        if not process.is_alive():
            return False
    return True


def log_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".log")


def log_of(folder: Path) -> str:
    return log_file(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nobody touched, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    ended = run(folder)
    assert ended.status == 0, log_of(folder)
    return folder, ended.seconds


def test_kills_change_no_byte(uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    straight, seconds = uninterrupted
    folder = tmp_path / "run"
    draw = random.Random(11)
    killed = in_checkpoint = 0
    for attempt in range(KILLS):
        # Two of three wait until the writing of a checkpoint has begun, the rest strike anywhere.
        kill = (
            {"in_checkpoint": draw.randint(1, 3), "after_s": draw.uniform(0, 0.01)}
            if attempt % 3
            else {"after_s": draw.uniform(0.1, 0.25) * seconds}
        )
        ended = run(folder, resume=attempt > 0, **kill)
        assert ended.status in (-signal.SIGKILL, 0), log_of(folder)
        killed += ended.status != 0
        in_checkpoint += ended.partial
    assert killed >= KILLS - 1, "the run ended before the kills: make it longer"
    assert in_checkpoint >= 2, "no kill struck while a checkpoint was written"
    ended = run(folder, resume=True)
    assert ended.status == 0, log_of(folder)
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


def test_resuming_a_finished_run_changes_nothing(uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    import shutil

    straight, _ = uninterrupted
    folder = shutil.copytree(straight, tmp_path / "run")
    ended = run(folder, resume=True)
    assert ended.status == 0, log_of(folder)
    assert_same_run(folder, straight)


def test_ctrl_c_saves_and_the_run_can_go_on(uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    straight, _ = uninterrupted
    folder = tmp_path / "run"
    ended = run(folder, in_checkpoint=3, after_s=0.02, signal=signal.SIGINT)
    assert ended.status == 0, log_of(folder)
    assert "Stopping after this step; the state is saved" in log_of(folder)
    stopped_at = max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
    assert 3 <= stopped_at < STEPS
    ended = run(folder, resume=True)
    assert ended.status == 0, log_of(folder)
    name = "adapter/adapter_model.safetensors"
    assert support.digest(folder / name) == support.digest(straight / name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_change_no_byte_of_smollm2(tmp_path: Path) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "run"
    ended = run(straight, model="smollm2")
    assert ended.status == 0, log_of(straight)
    draw = random.Random(12)
    for attempt in range(10):
        kill = {"in_checkpoint": draw.randint(1, 3), "after_s": draw.uniform(0, 0.3)}
        if attempt % 2:
            kill = {"after_s": draw.uniform(0.05, 0.2) * ended.seconds}
        assert run(folder, model="smollm2", resume=attempt > 0, **kill).status in (-signal.SIGKILL, 0)
    assert run(folder, model="smollm2", resume=True).status == 0, log_of(folder)
    name = "adapter/adapter_model.safetensors"
    assert support.digest(folder / name) == support.digest(straight / name)
