"""What every arm shares: the job, the clock, the arguments of Trainer-based arms, the result.

Imported in each library's own environment: torch, numpy, safetensors and the standard library only, transformers where
a Trainer is used.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arms.rates import flops_per_token, gemm_tflops
from benchmarks.record import environment
from benchmarks.workload import RANK, Workload, load

__all__ = [
    "BATCH",
    "LEARNING_RATE",
    "ONE_BY_ONE",
    "Clock",
    "Job",
    "RefusedError",
    "checkpointed_modules",
    "precision",
    "run",
    "trainer_arguments",
]

BATCH = 8
LEARNING_RATE = 2e-4
# The same step as eight micro-batches of a row each: nothing is padded.
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
# Beside those that ``environment`` knows.
_PACKAGES = ("trl", "unsloth", "unsloth_zoo", "litgpt", "lightning")


class RefusedError(Exception):
    """The library says that it does not do what the arm asks for; the message goes into the table."""


@dataclass(frozen=True, slots=True)
class Job:
    """One arm to run, as ``benchmarks.train`` hands it over.

    Attributes:
        variant: what stands behind the library's name in the arm's, "" for its defaults.
        loss: "answers" or "all".
        dtype: forced on weights and computation; None leaves it to the library.
    """

    arm: str
    variant: str
    workload: str
    result: str
    steps: int
    warmup: int
    loss: str
    device: str
    dtype: str | None

    def data(self) -> Workload:
        """Read the workload."""
        return load(self.workload)

    def rows(self) -> list[dict[str, list[int]]]:
        """Return exactly the rows of this run, 8 a step."""
        return self.data().rows(self.loss, BATCH * (self.steps + self.warmup))


@dataclass(slots=True)
class Clock:
    """Seconds of each step, and of the timed steps together with everything between them."""

    job: Job
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gemm_rates: list[float] = field(default_factory=list)
    _began: float = 0.0
    _timed_from: float = 0.0
    _timed_until: float = 0.0
    _cpu_from: tuple[float, float] = (0.0, 0.0)
    _cpu_until: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        """Call before the forward pass of a step."""
        self._wait()
        if not self.seconds and not self.job.warmup:
            self._timed_from, self._cpu_from = time.perf_counter(), _cpu_seconds()
        self._began = time.perf_counter()

    def end(self) -> None:
        """Call after the optimizer's step."""
        self._wait()
        self._timed_until, self._cpu_until = time.perf_counter(), _cpu_seconds()
        self.seconds.append(self._timed_until - self._began)
        if len(self.seconds) == self.job.warmup:
            self._timed_from, self._cpu_from = self._timed_until, self._cpu_until

    def measure_gemm(self, dtype: str) -> None:
        """Measure the machine's rate of matrix products in ``dtype``; called before and after training."""
        self.gemm_rates.append(gemm_tflops(self.job.data(), dtype, self.job.device))

    def callback(self) -> Any:
        """Return a transformers ``TrainerCallback`` that calls this clock and keeps the logged losses."""
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                clock.begin()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                clock.end()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if logs and "loss" in logs:
                    clock.losses.append(float(logs["loss"]))

        return Callback()

    def figures(self) -> dict[str, Any]:
        """Return tokens per second over all timed steps (padding excluded) and the quantiles of a step."""
        expected = self.job.warmup + self.job.steps
        if len(self.seconds) != expected or len(self.losses) != expected:
            raise RuntimeError(f"{len(self.seconds)} steps and {len(self.losses)} losses instead of {expected}")
        tokens = sum(len(row["input_ids"]) for row in self.job.rows()[BATCH * self.job.warmup :])
        timed = self.seconds[self.job.warmup :]
        deciles = statistics.quantiles(timed, n=10, method="inclusive") if len(timed) > 1 else timed * 9
        user, system = (until - since for until, since in zip(self._cpu_until, self._cpu_from, strict=True))
        return {
            "tokens_per_s": tokens / (self._timed_until - self._timed_from),
            "tokens": tokens,
            "step_s": {"p20": deciles[1], "p50": deciles[4], "p80": deciles[7]},
            # On a machine with other work, the processor's time says more than the wall's.
            "cpu_s": {"user": user, "system": system},
            "losses": self.losses,
        }

    def _wait(self) -> None:
        if self.job.device == "cuda":
            import torch

            torch.cuda.synchronize()


def trainer_arguments(job: Job, folder: str) -> dict[str, Any]:
    """Return the arguments that every Trainer is given: they fix what is computed, not how."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_steps": job.warmup + job.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": job.device == "cpu",
        "disable_tqdm": True,
    }


def precision(model: Any, autocast: str | None = None) -> dict[str, Any]:
    """Return the dtypes of frozen weights, adapter and autocast, and that of the matrix products."""
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for parameter in model.parameters():
        if parameter.ndim > 1:
            kinds[parameter.requires_grad].add(str(parameter.dtype).removeprefix("torch."))
    names = {"no": None, "bf16": "bfloat16", "fp16": "float16"}
    cast = names.get(autocast or "no", autocast)
    weights = "+".join(sorted(kinds[False]))
    return {
        # Quantized weights are integers, or packed ones; the norms beside them say what is computed in.
        "dtype": cast or "+".join(sorted(kinds[False] - {"uint8", "int8"})),
        "precision": {"weights": weights, "adapter": "+".join(sorted(kinds[True])), "autocast": cast},
    }


def checkpointed_modules(model: Any) -> int:
    """Return how many modules of a transformers model recompute their inside in the backward pass."""
    return sum(bool(getattr(module, "gradient_checkpointing", False)) for module in model.modules())


def run(train: Callable[[Job, Clock], dict[str, Any]]) -> None:
    """Train the job of the command line and write its figures, or the reason why there are none.

    ``train`` returns at least the keys of :func:`precision`; what else it returns goes into the record.
    """
    job = Job(**json.loads(sys.argv[1]))
    clock = Clock(job)
    try:
        facts = train(job, clock)
    except RefusedError as error:
        record = {"arm": job.arm, "refused": str(error)}
    except ImportError as error:
        record = {"arm": job.arm, "missing": f"{error} (make peers)"}
    else:
        record = _record(job, clock, facts)
    Path(job.result).write_text(json.dumps(record), encoding="utf-8")


def _record(job: Job, clock: Clock, facts: dict[str, Any]) -> dict[str, Any]:
    peaks = _peaks(job.device)
    clock.measure_gemm(facts["dtype"])
    figures, workload, machine = clock.figures(), job.data(), environment()
    for name in _PACKAGES:
        if (version := _version(name)) is not None:
            machine["versions"][name] = version
    if job.device == "cpu":
        machine["device"] = "cpu"
    needed = flops_per_token(workload)
    rate = statistics.mean(clock.gemm_rates)
    return {
        **machine,
        "arm": job.arm,
        **_rounded(figures),
        **peaks,
        "loss_on": job.loss,
        "steps": job.steps,
        "warmup": job.warmup,
        "shapes": {"rows_a_step": BATCH, "rank": RANK, **workload.facts},
        "gemm_tflops": _rounded(clock.gemm_rates),
        "gemm_share": round(needed * figures["tokens_per_s"] / (rate * 1e12), 3),
        "flops_per_token": needed,
        **facts,
    }


def _peaks(device: str) -> dict[str, int]:
    """Return the peak resident set of this process; on a GPU that of its allocator, and the former beside it."""
    # Linux counts in KiB, macOS in bytes.
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # A child process inherits that from the one that started it. VmHWM is its own, on Linux.
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    host = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), host)
    if device == "cpu":
        return {"peak_bytes": host}
    import torch

    return {"peak_bytes": int(torch.cuda.max_memory_allocated()), "peak_host_bytes": host}


def _cpu_seconds() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
