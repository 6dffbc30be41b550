"""The Triton kernels, interpreted on a CPU (``make test-kernels``) or as they are on a GPU.

The interpreter truncates where it stores bfloat16, so that dtype is tested on a GPU only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from ..conftest import ROOT
from .kernel_cases import CASES, Case, compare

pytest.importorskip("triton", reason="the package triton is not installed: make test-kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]

KERNELS = [case for case in CASES if case.op != "attention_varlen"]  # It has no kernel of its own.


def needs_device(test: Any) -> Any:
    """Run on a GPU with ``-m gpu``, or interpreted."""
    if not INTERPRETED and torch.cuda.is_available():
        return pytest.mark.gpu(test)
    reason = "no GPU, and TRITON_INTERPRET=1 is not set: make test-kernels"
    return pytest.mark.skipif(not INTERPRETED, reason=reason)(test)


@needs_device
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # A sigmoid far below zero is 0.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_as_accurate_as_plain_torch(case: Case, dtype: torch.dtype) -> None:
    for comparison in compare(case, "triton", dtype, DEVICE):
        assert comparison.passes, str(comparison)


@pytest.fixture(scope="module")
def far_rows() -> torch.Tensor:
    """Return (3, 512) float16 whose last row begins past 2**31 values; pages that nobody touches take no memory."""
    stride = 2**30 + 64
    return torch.empty(2 * stride + 512, dtype=torch.float16, device=DEVICE).as_strided((3, 512), (stride, 1))


@needs_device
def test_offsets_past_31_bits(far_rows: torch.Tensor) -> None:
    """A product of row and stride in 32 bits would wrap around."""
    from tunesmith.ops.float8 import triton as float8
    from tunesmith.ops.linear_cross_entropy import triton as losses
    from tunesmith.ops.rms_norm import triton as norm
    from tunesmith.ops.rope import triton as rope
    from tunesmith.ops.swiglu import triton as gate

    near = torch.randn(3, 512, device=DEVICE).half()
    weight, rstd = torch.ones(512, device=DEVICE).half(), torch.ones(3, device=DEVICE)
    tables = torch.ones(3, 64, device=DEVICE), torch.ones(3, 64, device=DEVICE)
    far_heads, near_heads = (x.view(3, 8, 64) for x in (far_rows, near))
    targets = torch.tensor([1, 2, 3], device=DEVICE)

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        rope.rotate_(heads, *tables)
        return heads

    def turned(heads: torch.Tensor) -> torch.Tensor:
        rope.norm_rotate(heads, weight[:64], *tables, eps=1e-5, offset=0.0, out=heads)
        return heads

    def unturned(heads: torch.Tensor) -> torch.Tensor:
        one = torch.ones(3, 8, device=DEVICE)
        return rope.norm_rotate_backward(heads, heads, weight[:64], one, *tables, offset=0.0, out=heads)

    def lost(logits: torch.Tensor) -> torch.Tensor:
        options: Any = {"logit_scale": 1.0, "softcap": None, "label_smoothing": 0.0, "want_grad": True}
        return losses.row_losses_(logits, targets, 1.0, **options)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        codes = torch.empty(3, 512, dtype=torch.float8_e4m3fn, device=DEVICE)
        return float8.quantize_rows(x, None, codes) * codes.float()

    calls = {
        "float8 rows": rounded,
        "norm": lambda x: norm.forward(x, weight, eps=1e-5, offset=0.0, out=x)[0],
        "norm with residual": lambda x: norm.forward(x, weight, eps=1e-5, offset=0.0, residual=x, out=x)[1],
        "norm backward": lambda x: norm.backward(x, x, weight, rstd, offset=0.0, dresidual=x, out=x),
        "norm weight": lambda x: norm.weight_gradient(x, x, rstd),
        "gate": lambda x: gate.forward(x, activation="silu", out=x[:, :256]),
        "gate backward": lambda x: gate.backward(x[:, :256], x, activation="silu", out=x, hidden_out=x[:, :256]),
        "rotate": lambda x: rotated(x.view(3, 8, 64)),
        "norm_rotate": lambda x: turned(x.view(3, 8, 64)),
        "norm_rotate backward": lambda x: unturned(x.view(3, 8, 64)),
        "row losses": lost,
    }
    assert far_heads.stride(0) == far_rows.stride(0) and near_heads.is_contiguous()
    for name, call in calls.items():
        far_rows.copy_(near)
        ours = call(far_rows).clone()
        assert torch.equal(ours, call(near.clone())), name


@needs_device
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # In rows that are not finite.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_float8_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    from tunesmith.ops.float8 import reference
    from tunesmith.ops.float8.triton import quantize_rows

    x = torch.randn(64, 700, device=DEVICE).to(dtype)
    x[0], x[1, 3], x[2, 5] = 0.0, torch.nan, torch.inf
    factor = torch.rand(700, device=DEVICE) + 0.1
    for given in (None, factor):
        codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
        scales = quantize_rows(x, given, codes)
        wanted, wanted_scales = reference.quantize_rows(x, given)
        torch.testing.assert_close(scales[3:], wanted_scales[3:], rtol=1e-6, atol=0)
        assert scales[0] == 1 and not codes[0].float().any()
        assert scales[1:3].isnan().all() and wanted_scales[1:3].isnan().all()
        # A division that is off by a last bit may put a value that lies half way on the other side, seldom.
        ours, theirs = codes[3:].float(), wanted[3:].float()
        if INTERPRETED:
            # The interpreter loses the carry where a value is rounded up to a power of two, and cuts small ones.
            lost = (torch.frexp(theirs).mantissa.abs() == 0.5) | (theirs.abs() < 2**-6)
            ours = torch.where(lost, theirs, ours)
        assert (ours != theirs).float().mean() < 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0.13, atol=2**-9)


@needs_device
def test_a_second_run_gives_the_same_bits() -> None:
    """What is computed again in the backward has to be what the forward saw."""
    from tunesmith.ops.rms_norm import triton as norm

    x, weight = torch.randn(9, 576, device=DEVICE), torch.randn(576, device=DEVICE)
    first, again = (norm.forward(x, weight, eps=1e-5, offset=0.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    grads = [norm.weight_gradient(x, x, first[2]) for _ in range(2)]
    assert torch.equal(*grads)


@needs_device
def test_rows_that_hold_nothing_but_minus_infinity_in_a_block() -> None:
    """A padded vocabulary may be switched off with -inf; blocks of it must not give NaN."""
    from tunesmith.ops.linear_cross_entropy.triton import row_losses_

    logits = torch.full((2, 20_000), float("-inf"), device=DEVICE)
    logits[:, 9000:9010] = torch.arange(10.0, device=DEVICE)
    targets = torch.tensor([9003, 9009], device=DEVICE)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    options: Any = {"logit_scale": 1.0, "softcap": None, "label_smoothing": 0.0}
    torch.testing.assert_close(row_losses_(logits, targets, 1.0, want_grad=True, **options), expected)
    assert torch.isfinite(logits).all()


def test_every_kernel_compiles_for_a_gpu() -> None:
    """For compute capability 9.0, in bfloat16, down to machine code: Triton's compiler needs no GPU for that."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "from tests.ops.compile_kernels import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("compiled") >= 8
