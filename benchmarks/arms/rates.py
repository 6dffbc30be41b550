"""What the machine multiplies, and how much of it a token needs: both in the arm's own process."""

from __future__ import annotations

import json
import time

from benchmarks.workload import TARGETS, Workload

__all__ = ["flops_per_token", "gemm_tflops"]

_ROWS = 2048
_REPETITIONS = 8


def gemm_tflops(workload: Workload, dtype: str, device: str) -> float:
    """Return the rate of the MLP's two products for 2,048 tokens on warm buffers, the best of several."""
    import torch

    config = json.loads((workload.folder / "model" / "config.json").read_text(encoding="utf-8"))
    wide, narrow = config["intermediate_size"], config["hidden_size"]
    best = 0.0
    for inner, outer in ((narrow, wide), (wide, narrow)):
        x = torch.randn(_ROWS, inner, device=device).to(getattr(torch, dtype))
        w = torch.randn(inner, outer, device=device).to(x.dtype)
        out = torch.empty(_ROWS, outer, device=device, dtype=x.dtype)
        for _ in range(_REPETITIONS):
            began = time.perf_counter()
            torch.mm(x, w, out=out)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * x.numel() * outer / (time.perf_counter() - began))
    return best / 1e12


def flops_per_token(workload: Workload) -> int:
    """Return the work in the frozen weights of the adapted layers: one product forward, one for the input's gradient.

    Head, attention, adapter and everything elementwise come on top and are not counted.
    """
    from safetensors import safe_open

    total = 0
    for shard in (workload.folder / "model").glob("*.safetensors"):
        with safe_open(shard, framework="np") as file:
            for name in list(file.keys()):
                if name.split(".")[-2] in TARGETS:
                    rows, columns = file.get_slice(name).get_shape()
                    total += 4 * rows * columns
    return total
