"""Processes forked from one that has imported everything: a process that a test kills costs no import of torch."""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT

PRELOADED = ["tunesmith.training.sft", "transformers.models.llama.modeling_llama", "tests.training.test_equality"]


def start(target: Callable[..., None], *arguments: Any, out: Path | str, err: Path | str | None = None) -> BaseProcess:
    """Start ``target(*arguments)`` in a process of its own, whose output is appended to ``out`` (and ``err``)."""
    process = _fork_server().Process(target=_run, args=(out, err or out, target, arguments))
    process.start()
    return process


def run(call: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Stand in for ``subprocess.run`` of ``python -m MODULE ...`` with its output captured."""
    assert call[:2] == [sys.executable, "-m"], call
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(_as_module, call[2:], out=out, err=err)
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(call, process.exitcode, *(file.read_text("utf-8") for file in (out, err)))


def _as_module(words: list[str]) -> None:
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


@cache
def _fork_server() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        # It imports before it learns this process's sys.path.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [*sys.path, str(ROOT / "src"), str(ROOT)])))
        forkserver.ensure_running()
    first = context.Process(target=gc.freeze)  # starts when all is imported
    first.start()
    first.join()
    return context


def _run(out: Path | str, err: Path | str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # A run collects garbage when it begins, and need not look through the libraries for it.
    gc.freeze()
    for descriptor, place in ((1, out), (2, err)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o644), descriptor)
    target(*arguments)
