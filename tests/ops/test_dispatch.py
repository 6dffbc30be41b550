"""Which implementation runs, and that it can be asked why."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith import ops
from tunesmith.ops import dispatch

OPS = sorted(dispatch._TABLE)


def on(device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What the choice looks at of a tensor, on any device."""
    return SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_and_primitives(op: str) -> None:
    assert importlib.import_module(f"tunesmith.ops.{op}.reference").__all__
    for implementation in dispatch._TABLE[op]:
        assert implementation in ("cpu", "triton", "cuda")
    assert dispatch._TABLE[op][-1] == "cpu", "the last one runs on every device"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_the_cpu_plain_torch_runs(op: str, dtype: torch.dtype) -> None:
    x = torch.zeros(1, dtype=dtype)
    choice = dispatch.choose(op, x)
    assert choice.implementation == "cpu"
    assert ops.explain(op, x) == f"{op}: cpu ({choice.reason})"


def test_the_reason_is_given() -> None:
    x = torch.zeros(1)
    assert ops.explain("rope", x).startswith("rope: cpu (")
    assert "triton kernels need a" in ops.explain("rope", x)


def test_primitives_are_the_module_that_was_chosen() -> None:
    from tunesmith.ops.rms_norm import cpu

    assert dispatch.primitives("rms_norm", torch.zeros(1)) is cpu


def test_an_op_that_is_not_there() -> None:
    with pytest.raises(KeyError, match="no op 'gelu'; there are attention_varlen, "):
        ops.explain("gelu", torch.zeros(1))


def test_a_gpu_gets_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    dispatch._choose.cache_clear()
    try:
        assert dispatch.choose("rms_norm", on("cuda")).implementation == "triton"
        assert dispatch.choose("rms_norm", on("cuda", torch.float32)).implementation == "triton"
        assert dispatch.choose("rms_norm", on("cuda", torch.float64)).implementation == "cpu"
        assert dispatch.choose("attention_varlen", on("cuda")).implementation == "cuda"
        assert dispatch.choose("attention_varlen", on("cuda", torch.float32)).implementation == "cpu"
        assert dispatch.choose("lora_linear", on("cuda")).implementation == "cpu"
        assert "mps" in dispatch.choose("rms_norm", on("mps")).reason
    finally:
        dispatch._choose.cache_clear()


def test_a_gpu_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    dispatch._choose.cache_clear()
    try:
        for _ in range(2):
            assert dispatch.choose("swiglu", on("cuda")).implementation == "cpu"
        assert [record.message for record in caplog.records] == [
            "swiglu runs in plain torch, slower: the package triton is not installed"
        ]
    finally:
        dispatch._choose.cache_clear()
