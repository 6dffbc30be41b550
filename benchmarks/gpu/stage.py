"""What every stage is given: the device, how large to be, until when, and where its records go."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Stage", "quantiles", "seconds_of"]


@dataclass
class Stage:
    """One stage of one run.

    Attributes:
        name: of the stage.
        is_dry: toy sizes on a CPU, where nothing is claimed about speed.
        deadline: ``time.time()`` after which nothing new is begun.
        out: the file of JSON lines.
        environment: what goes into every record.
    """

    name: str
    is_dry: bool
    deadline: float
    out: Path
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The device as torch names it."""
        return "cpu" if self.is_dry else "cuda"

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def record(self, **facts: Any) -> dict[str, Any]:
        """Write one record at once, so that what was measured outlives a crash, and return it."""
        line = {**self.environment, "stage": self.name, "dry_run": self.is_dry, **facts}
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded(line)) + "\n")
        return line


def rounded(value: Any) -> Any:
    """Return ``value`` with floats of six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
    return {"p20": deciles[1], "p50": deciles[4], "p80": deciles[7]}


def seconds_of(call: Callable[[], Any], *, repetitions: int, device: str, warmup: int = 3) -> dict[str, float]:
    """Return quantiles of the time of ``call``, on a GPU by its own clock, after some calls that do not count."""
    for _ in range(warmup):
        call()
    if device == "cpu":
        samples: list[float] = []
        for _ in range(repetitions):
            began = time.perf_counter()
            call()
            samples.append(time.perf_counter() - began)
        return quantiles(samples)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    torch.cuda.synchronize()
    for began, ended in events:
        began.record()
        call()
        ended.record()
    torch.cuda.synchronize()
    return quantiles([began.elapsed_time(ended) / 1e3 for began, ended in events])
