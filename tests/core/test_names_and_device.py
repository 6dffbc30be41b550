from __future__ import annotations

import pickle
import sys

import pytest
import torch

from tunesmith.core import errors
from tunesmith.core.device import choose_device, choose_dtype, describe_device, is_bfloat16_supported, parse_dtype
from tunesmith.core.errors import ModelError, TunesmithError
from tunesmith.core.memory import peak_bytes
from tunesmith.core.names import did_you_mean, nearest
from tunesmith.core.versions import installed, stack_versions


def test_the_nearest_name() -> None:
    known = ["q_proj", "k_proj", "learning_rate"]
    assert did_you_mean("q_porj", known) == " Did you mean 'q_proj'?"
    assert did_you_mean("Learning_Rate", known) == " Did you mean 'learning_rate'?"
    assert did_you_mean("zebra", known) == ""
    assert did_you_mean("x", []) == ""
    assert nearest("q_proj", known, most=2) == ["q_proj", "k_proj"]


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_are_also_stdlib_errors_and_travel_between_processes(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, TunesmithError)
    assert kind is TunesmithError or len(kind.__mro__) > len(TunesmithError.__mro__) + 1
    copy = pickle.loads(pickle.dumps(kind("what failed")))
    assert type(copy) is kind and str(copy) == "what failed"
    assert kind.__doc__


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("torch.bfloat16", torch.bfloat16), ("FLOAT32", torch.float32), ("half", torch.float16),
     ("double", torch.float64), (torch.float32, torch.float32)],
)  # fmt: skip
def test_dtypes_by_name(name: str, dtype: torch.dtype) -> None:
    assert parse_dtype(name) == dtype


def test_an_unknown_dtype_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"dtype 'blfoat16' is not known. Did you mean 'bfloat16'?"):
        parse_dtype("blfoat16")


def test_the_dtype_asked_for_is_used() -> None:
    choice = choose_dtype("float32", torch.device("cpu"))
    assert (choice.dtype, choice.name, choice.reason) == (torch.float32, "float32", "asked for")
    with pytest.raises(ModelError, match="float16 is many times slower than float32 on a CPU"):
        choose_dtype("float16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("amx", "avx", "dtype", "reason", "asked"),
    [
        (True, False, torch.bfloat16, "this CPU has AMX units", "asked for"),
        (False, True, torch.bfloat16, "this CPU has AVX512-BF16 units", "asked for"),
        (False, False, torch.float32, "this CPU has no bfloat16 units, float32 is faster there",
         "asked for, but this CPU has no bfloat16 units: float32 is several times as fast there"),
    ],
)  # fmt: skip
def test_the_hardware_decides_with_a_reason(
    amx: bool, avx: bool, dtype: torch.dtype, reason: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    choice = choose_dtype(None, torch.device("cpu"))
    assert (choice.dtype, choice.reason) == (dtype, reason)
    assert choose_dtype("bfloat16", torch.device("cpu")).reason == asked


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_gpus_by_their_capability(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = choose_dtype(None, torch.device("cuda"))
    assert choice.dtype == dtype
    assert choice.reason.startswith(f"compute capability {capability[0]}.{capability[1]}")
    assert choose_dtype("float32", torch.device("cuda")).dtype == torch.float32
    if dtype == torch.float16:
        with pytest.raises(ModelError, match="bfloat16 is not computed by this GPU"):
            choose_dtype("bfloat16", torch.device("cuda"))


def test_the_device_of_this_machine() -> None:
    device = choose_device()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert describe_device(torch.device("cpu")).startswith(f"CPU, {torch.get_num_threads()} threads")
    assert is_bfloat16_supported() in (True, False)


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_bytes()
    block = bytearray(b"\1" * (before + 64 * 2**20)) if before < 2**31 else bytearray()
    assert peak_bytes() >= before + len(block) // 4
    assert sys.getsizeof(block) < 2**33


def test_versions_of_what_is_installed() -> None:
    found = stack_versions()
    assert found["torch"] == installed("torch")
    assert installed("no-such-package-anywhere") is None
    assert "transformers" in found
