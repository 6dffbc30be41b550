"""Each op of tunesmith.ops against plain torch: forward and backward of one call, at the shapes of one step.

    python -m benchmarks.ops [--dtype float32] [--device cpu] [--ops rms_norm,swiglu] [--repetitions 20] [--record]

Plain torch is the op's readable reference under autograd; for attention it is torch's own
``scaled_dot_product_attention``, one document at a time. Rates count what must be read, written or multiplied at
least, not what an implementation happens to do. Shapes are those of SmolLM2-135M with 8 documents of 1,450 tokens
together, 7.5 % of them trained. Ours and plain torch take turns, so that other load meets both.

To add an op, add a :class:`Case`: inputs, the two functions, and its work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.record import append_record, environment

__all__ = ["CASES", "Case", "measure"]

T, D, F, V, R = 1450, 576, 1536, 49152, 16
HEADS, KEY_HEADS, E = 9, 3, 64
LENGTHS = (553, 244, 182, 150, 134, 99, 61, 27)
TRAINED = 109


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape.

    Attributes:
        op: the name of its folder; its public function has the name ``function``, the same as the op if empty.
        inputs: shapes of the tensors drawn, by argument; those that train are given as ``trained``.
        more: other arguments; a function of the device where they are tensors.
        elements, flops: numbers read and written, and multiplications and additions, of forward and backward.
        plain: plain torch where that is not the reference.
    """

    op: str
    inputs: dict[str, tuple[int, ...]]
    trained: tuple[str, ...]
    more: Callable[[str], dict[str, Any]]
    elements: int = 0
    flops: int = 0
    function: str = ""
    plain: Callable[..., torch.Tensor] | None = None

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function or self.op


def _tables(device: str) -> dict[str, torch.Tensor]:
    angles = torch.arange(T, device=device)[:, None] * 10_000 ** -torch.linspace(0, 1, E // 2, device=device)
    angles = torch.cat([angles, angles], dim=1)
    return {"cos": angles.cos(), "sin": angles.sin()}


def _targets(device: str) -> dict[str, Any]:
    return {"targets": torch.arange(TRAINED, device=device) * 7919 % V, "divisor": TRAINED}


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], *, scale: float
) -> torch.Tensor:
    parts = zip(*(tensor.split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    done = [attend(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)[0] for q, k, v in parts]
    return torch.cat(done, dim=1).transpose(0, 1)


# Causal attention multiplies over half of each square: 2 products forward, 5 backward, 2 FLOP each.
_ATTENTION_FLOPS = 7 * 2 * HEADS * E * sum(length * (length + 1) // 2 for length in LENGTHS)

CASES = (
    Case("rms_norm", {"x": (T, D), "weight": (D,)}, ("x",), lambda _: {"eps": 1e-5}, elements=5 * T * D),
    Case("swiglu", {"gate_up": (T, 2 * F)}, ("gate_up",), lambda _: {}, elements=8 * T * F),
    Case("rope", {"heads": (T, HEADS, E)}, ("heads",), _tables, elements=4 * T * HEADS * E, function="rotate"),
    Case("attention_varlen", {"query": (HEADS, T, E), "key": (KEY_HEADS, T, E), "value": (KEY_HEADS, T, E)},
         ("query", "key", "value"), lambda _: {"lengths": LENGTHS, "scale": E**-0.5}, flops=_ATTENTION_FLOPS,
         plain=_sdpa),
    Case("lora_linear", {"x": (T, D), "weight": (F, D), "a": (R, D), "b": (F, R)}, ("x", "a", "b"),
         lambda _: {"scale": 1.0}, flops=4 * T * D * F + 6 * T * R * (D + F)),
    Case("linear_cross_entropy", {"hidden": (TRAINED, D), "weight": (V, D)}, ("hidden",), _targets,
         flops=4 * TRAINED * D * V),
)  # fmt: skip


def measure(case: Case, *, dtype: str, device: str, repetitions: int) -> dict[str, Any]:
    """Time forward and backward of both implementations and return a record."""
    module = importlib.import_module(f"tunesmith.ops.{case.op}")
    plain = case.plain or getattr(module.reference, case.name)
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    tensors = {name: _draw(shape, generator).to(device, kind) for name, shape in case.inputs.items()}
    for name in case.trained:
        tensors[name].requires_grad_()
    more = {name: _cast(value, kind) for name, value in case.more(device).items()}
    trained = [tensors[name] for name in case.trained]
    samples: dict[str, list[float]] = {"ours": [], "plain": []}
    for repetition in range(repetitions + 2):
        for which, function in (("ours", getattr(module, case.name)), ("plain", plain)):
            seconds = _once(function, {**tensors, **more}, trained, device)
            if repetition >= 2:  # Kernels are prepared and memory is touched in the first ones.
                samples[which].append(seconds)
    record: dict[str, Any] = {
        "op": case.name,
        "dtype": dtype,
        "on": device,
        "shapes": {name: list(shape) for name, shape in case.inputs.items()},
    }
    for which, seconds in samples.items():
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        rate = {"gflops": case.flops / deciles[4] / 1e9} if case.flops else {}
        if case.elements:
            rate = {"gb_per_s": case.elements * kind.itemsize / deciles[4] / 1e9}
        record[which] = {"p20_s": deciles[1], "p50_s": deciles[4], "p80_s": deciles[7], **rate}
    record["speedup"] = record["plain"]["p50_s"] / record["ours"]["p50_s"]
    return json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.5g}"))


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _once(
    function: Callable[..., torch.Tensor], arguments: dict[str, Any], trained: list[torch.Tensor], device: str
) -> float:
    began = time.perf_counter()
    out = function(**arguments)
    torch.autograd.grad(out, trained, torch.ones_like(out))
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _line(record: dict[str, Any]) -> str:
    ours, plain = record["ours"], record["plain"]
    rate = f"{ours['gflops']:8.1f} GFLOP/s" if "gflops" in ours else f"{ours['gb_per_s']:8.1f} GB/s   "
    spread = " ".join(f"{ours[key] * 1e3:8.2f}" for key in ("p20_s", "p50_s", "p80_s"))
    return (
        f"{record['op']:22}{record['dtype']:10}{spread}   {plain['p50_s'] * 1e3:8.2f} {record['speedup']:6.2f}x{rate}"
    )


def main() -> None:
    """Measure the chosen ops, print a table and one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ops", help="comma-separated; all by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/ops.jsonl")
    arguments = parser.parse_args()
    wanted = None if arguments.ops is None else set(arguments.ops.split(","))
    chosen = [case for case in CASES if wanted is None or {case.op, case.name} & wanted]
    print(f"{'milliseconds of':32}{'p20':>8} {'p50':>8} {'p80':>8}   {'plain p50':>8} {'ratio':>6}")
    records = []
    for case in chosen:
        record = measure(
            case, dtype=arguments.dtype, device=arguments.device, repetitions=max(2, arguments.repetitions)
        )
        print(_line(record), flush=True)
        records.append(record)
    for record in records:
        print(append_record("ops", record) if arguments.record else json.dumps({**environment(), **record}))


if __name__ == "__main__":
    main()
