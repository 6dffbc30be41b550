"""Two real processes on gloo: they compute what one computes, and neither waits for a dead one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tests import forking, tiny
from tests.conftest import ROOT
from tests.e2e import _worker
from tests.e2e._worker import EQUAL
from tests.engine.test_head import assert_close
from tests.training import support
from tests.training.test_equality import GradientRecorder

from tunesmith.core.files import damage

PATIENCE_S = 30


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def under_torchrun(folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(free_port()), "-m", "tests.e2e._worker", str(folder), "equal"]  # fmt: skip
    ended = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]


def forked(folder: Path) -> None:
    """What torchrun does, without three processes that import torch."""
    with two_processes(folder, "equal") as (processes, logs):
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0, 0], [log.read_text() for log in logs]


@pytest.mark.parametrize("train", [forked, pytest.param(under_torchrun, marks=pytest.mark.slow)])
def test_two_processes_equal_one(train: Callable[[Path], None], tmp_path: Path) -> None:
    train(tmp_path)
    recorder = GradientRecorder()
    alone = support.trainer(
        tmp_path / "alone", per_device_train_batch_size=4, callbacks=[recorder],
        eval_dataset=tiny.chat_rows(5, seed=9), **EQUAL,
    )  # fmt: skip
    alone.train()
    first, second = (torch.load(tmp_path / f"result-{rank}.pt") for rank in (0, 1))
    assert first["tokens"] != second["tokens"], "the point of the test is unequal shares"

    history = alone.state.log_history
    assert first["losses"] == pytest.approx([entry["loss"] for entry in history if "loss" in entry], rel=1e-5)
    assert first["eval"] == pytest.approx([entry["eval_loss"] for entry in history if "eval_loss" in entry], rel=1e-5)
    assert len(recorder.steps) == len(first["gradients"]) == 6
    for mine, other, single in zip(first["gradients"], second["gradients"], recorder.steps, strict=True):
        for name, gradient in single.items():
            assert torch.equal(mine[name], other[name]), f"the processes differ in {name}"
            assert_close(mine[name], gradient, 1e-5, name)
    for name, weight in support.trainable(alone.model).items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert_close(first["weights"][name], weight, 1e-5, name)
    # Written once, by the first process, with the random states of both.
    assert {path.name for path in (tmp_path / "run" / "checkpoint-6").iterdir()} >= {
        "adapter_model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth", "manifest.json"
    }  # fmt: skip


@contextmanager
def two_processes(folder: Path, kind: str) -> Iterator[tuple[list[BaseProcess], list[Path]]]:
    """Start both without torchrun, which would end one when the other dies; give them and their logs."""
    shared = environment(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    logs = [folder / f"log-{rank}" for rank in (0, 1)]
    processes = [
        forking.start(_worker.forked, folder, kind, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, out=log)
        for rank, log in enumerate(logs)
    ]
    try:
        yield processes, logs
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_a_message(victim: int, tmp_path: Path) -> None:
    with two_processes(tmp_path, "endless") as (processes, logs):
        wait_for_steps(tmp_path / "run" / "metrics.jsonl", processes, logs)
        processes[victim].kill()
        processes[1 - victim].join(PATIENCE_S)
        assert processes[1 - victim].exitcode not in (None, 0)
    log = logs[1 - victim].read_text(encoding="utf-8")
    assert "TrainingError: another process of this run died or stopped answering" in log, log[-3000:]
    assert "start all processes again with --resume" in log


def test_a_nan_on_one_process_stops_both(tmp_path: Path) -> None:
    with two_processes(tmp_path, "poisoned") as (processes, logs):
        for process in processes:
            process.join(150)
        assert [process.exitcode for process in processes] == [1, 1]
    for log in logs:
        text = log.read_text(encoding="utf-8")
        assert "TrainingError: a gradient is not finite in step 3, rows" in text
        assert "The state after step 2 is kept in" in text
    assert damage(tmp_path / "run" / "checkpoint-2") is None


def wait_for_steps(metrics: Path, processes: list[BaseProcess], logs: list[Path]) -> None:
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text(encoding="utf-8").splitlines()) < 3:
        assert all(process.is_alive() for process in processes), [log.read_text() for log in logs]
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.1)
