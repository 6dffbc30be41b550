"""Every kernel against float64 on the device, in bfloat16 and float16, and past 2**31 values.

The cases are those of ``tests/ops/kernel_cases.py``, and the same calls at the shapes of Llama 3.1 8B and Qwen3 4B. In
a dry run the primitives in plain torch stand for the kernels.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tests.ops.kernel_cases import CASES, EQUAL_DOCUMENTS, Case, cases_at, compare

from benchmarks.gpu.stage import Stage

__all__ = ["guarded", "run"]

_SHAPES: dict[str, dict[str, int]] = {
    "8b": {"tokens": 1024, "hidden": 4096, "ffn": 14336, "heads": 32, "key_heads": 8, "size": 128, "classes": 128256},
    "4b": {"tokens": 1001, "hidden": 2560, "ffn": 9728, "heads": 32, "key_heads": 8, "size": 128, "classes": 151936},
}
_DRY_SHAPES: dict[str, dict[str, int]] = {
    "toy": {"tokens": 33, "hidden": 48, "ffn": 40, "heads": 4, "key_heads": 2, "size": 8, "classes": 301}
}


def run(stage: Stage) -> None:
    """Record the errors of every case; ``passes`` is False where a case failed, and ``failed`` says how.

    Nearly every case compiles a kernel of its own, so float16 goes without most of the small ones.
    """
    for dtype in (torch.float32,) if stage.is_dry else (torch.bfloat16, torch.float16):
        for case in _cases(stage, every=1 if dtype == torch.bfloat16 else 4):
            if stage.seconds_left < 0:
                stage.record(
                    case="cases that were left", op="all", dtype="any", passes=False, failed="no time was left"
                )
                return
            stage.record(
                case=case.name, op=case.op, dtype=str(dtype).removeprefix("torch."), **_result(stage, case, dtype)
            )
    for case in () if stage.is_dry else EQUAL_DOCUMENTS:
        stage.record(case=case.name, op="attention, cuDNN", dtype="bfloat16", **_through_cudnn(stage, case))
    for (name, shape), backward in itertools.product(_float8_shapes(stage).items(), (False, True)):
        case = f"float8 product {'backward' if backward else 'forward'} {name}"
        stage.record(
            case=case,
            op="float8 products",
            dtype="bfloat16",
            **guarded(partial(_float8_product, stage, shape, backward=backward)),
        )
    for name, check in _far_checks(stage).items():
        stage.record(case=name, op=name.split(",")[0], dtype="bfloat16", **guarded(check))


def _cases(stage: Stage, *, every: int) -> Iterator[Case]:
    yield from CASES[::every]
    for shape in (_DRY_SHAPES if stage.is_dry else _SHAPES).values():
        yield from cases_at(**shape)


def _result(stage: Stage, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    implementation = "cuda" if case.op == "attention_varlen" else "triton"
    if stage.is_dry:
        implementation = "cpu"

    def check() -> dict[str, Any]:
        found = compare(case, implementation, dtype, stage.device)
        return {
            "passes": all(comparison.passes for comparison in found),
            "results": {
                c.result: {"rms": c.rms, "allowed": c.rms_allowed, "worst": c.worst, "worst_allowed": c.worst_allowed}
                for c in found
            },
        }

    return {"implementation": implementation, **guarded(check)}


def _through_cudnn(stage: Stage, case: Case) -> dict[str, Any]:
    """Compare attention that goes to cuDNN at once, and has to have gone there."""
    from unittest.mock import patch

    from tunesmith.ops.attention_varlen import cudnn

    with patch.object(cudnn, "_PREPARING_SECONDS", 0.0), patch.object(cudnn, "_agreed", {}):
        found = _result(stage, case, torch.bfloat16)
        return {**found, "passes": found["passes"] and list(cudnn._agreed.values()) == [True, True]}


def _float8_shapes(stage: Stage) -> dict[str, tuple[int, int, int]]:
    """Return (T, D, F) by name: q k v, gate up and down of Llama 3.1 8B."""
    if stage.is_dry:
        return {"toy": (33, 48, 80)}
    return {"8b q k v": (1024, 4096, 6144), "8b gate up": (1024, 4096, 28672), "8b down": (1001, 14336, 4096)}


def _float8_product(stage: Stage, shape: tuple[int, int, int], *, backward: bool) -> dict[str, Any]:
    """Compare a product in float8 with float64 of its rounded operands, and say what rounding them has changed.

    On a CPU torch's own product of the same operands stands for that of a GPU.
    """
    from tunesmith.engine.scratch import Scratch
    from tunesmith.ops.dispatch import choose
    from tunesmith.ops.float8 import Float8Product, quantize_rows
    from tunesmith.ops.quantized import quantize_float8

    tokens, inner, outer = shape
    generator = torch.Generator(stage.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=stage.device, dtype=torch.float32)
    stored = quantize_float8(0.02 * draw(outer, inner))
    x = (draw(tokens, outer if backward else inner) * draw(tokens, 1).exp()).bfloat16()
    made = Float8Product(stored, Scratch())
    out = torch.full((tokens, inner if backward else outer), torch.nan, dtype=torch.bfloat16, device=stage.device)
    factor = stored.scales.view(-1) if backward else None
    codes, scales = quantize_rows(x, factor=factor)
    weight = stored.codes.double() * stored.scales.double()
    if backward:
        made.input_gradient(x, out=out)
        truth, unrounded = (codes.double() * scales) @ stored.codes.double(), x.double() @ weight
    else:
        made.forward(x, out=out)
        truth, unrounded = (codes.double() * scales) @ weight.t(), x.double() @ weight.t()
    # Each row by its own size: a bfloat16 has 2^-9 of a value, and a GPU's fast sums 14 bits of their largest part.
    # Over 28,672 products that came to 0.0047 on an H200, beside 0.026 from rounding the rows.
    sizes = truth.square().mean(1, keepdim=True).sqrt()
    error = (out.double() - truth) / sizes
    rms, worst = float(error.square().mean().sqrt()), float(error.abs().max())
    allowed = {"allowed": 2**-7, "worst_allowed": 2**-3}
    return {
        "implementation": "torch on a CPU"
        if stage.is_dry
        else f"torch _scaled_mm, {choose('float8', x).implementation}",
        "emulated": stage.is_dry,
        "passes": rms <= allowed["allowed"] and worst <= allowed["worst_allowed"],
        "results": {"product": {"rms": rms, "worst": worst, **allowed}},
        "rounding_of_rows": float(((truth - unrounded) / sizes).square().mean().sqrt()),
    }


def guarded(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``check`` returns, or that it failed and how."""
    try:
        return check()
    # Whatever is wrong with one kernel, the others are still to be looked at.
    except Exception as error:
        return {"passes": False, "failed": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _far_checks(stage: Stage) -> dict[str, Callable[[], dict[str, Any]]]:
    """Calls on more than 2**31 values, whose last rows have to be those of a call on these rows alone."""
    implementation, device = ("cpu" if stage.is_dry else "triton"), stage.device
    limit = 2**12 if stage.is_dry else 2**31

    def kernels(op: str) -> Any:
        import importlib

        return importlib.import_module(f"tunesmith.ops.{op}.{implementation}")

    def rows(width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.zeros(limit // width + 9, width, dtype=dtype, device=device)
        last = torch.randn(8, width, device=device).to(dtype)
        whole[-8:] = last
        return whole, last

    def same(many: torch.Tensor, few: torch.Tensor) -> dict[str, Any]:
        return {"passes": torch.equal(many[-8:], few)}

    def gate() -> dict[str, Any]:
        whole, last = rows(64 if stage.is_dry else 28672)
        done = [kernels("swiglu").forward(x, activation="silu") for x in (whole, last)]
        return same(*done)

    def gate_backward() -> dict[str, Any]:
        whole, last = rows(64 if stage.is_dry else 28672)
        half = whole.shape[1] // 2
        dh = torch.ones(1, half, dtype=whole.dtype, device=device)
        done = [kernels("swiglu").backward(dh.expand(len(x), half), x, activation="silu", out=x) for x in (whole, last)]
        return same(*done)

    def norm() -> dict[str, Any]:
        whole, last = rows(64 if stage.is_dry else 4096)
        weight = torch.ones(whole.shape[1], dtype=whole.dtype, device=device)
        done = [kernels("rms_norm").forward(x, weight, eps=1e-5, offset=0.0, out=x)[0] for x in (whole, last)]
        return same(*done)

    def rotation() -> dict[str, Any]:
        whole, last = rows(64 if stage.is_dry else 5120)
        for x in (whole, last):
            table = torch.full((len(x), 8 if stage.is_dry else 128), 0.6, dtype=x.dtype, device=device)
            kernels("rope").rotate_(x.view(len(x), -1, table.shape[1]), table, table)
        return same(whole, last)

    def losses() -> dict[str, Any]:
        whole, last = rows(64 if stage.is_dry else 128256, torch.float32)
        settings: dict[str, Any] = {"logit_scale": 1.0, "softcap": None, "label_smoothing": 0.0, "want_grad": True}
        for x in (whole, last):
            kernels("linear_cross_entropy").row_losses_(
                x, torch.zeros(len(x), dtype=torch.long, device=device), 1.0, **settings
            )
        return same(whole, last)

    return {
        f"{name}, past 2**31 values": check
        for name, check in {
            "swiglu forward": gate,
            "swiglu backward": gate_backward,
            "rms_norm forward": norm,
            "rotate": rotation,
            "row losses": losses,
        }.items()
    }
