"""Steps from CUDA graphs against the same steps launched kernel by kernel: losses and gradients on the device.

Two comparisons. With the work launched on the same padded buffers only what attention sums by atomics may differ. With
the step that graphs stand for, on documents without padding, products have other shapes and round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import models
from benchmarks.gpu.models import Work
from benchmarks.gpu.parity import guarded
from benchmarks.gpu.stage import Stage

__all__ = ["check", "recorder_for"]

# Of the norm of all gradients together, and of the loss: bfloat16 has 8 bits, which errors of rounding partly average.
_ALLOWED = {"launched": 5e-3, "eager": 3e-2}
_DIVISOR = 1000.0
_STEPS = 8


def recorder_for(device: str) -> Any:
    """Return what records on ``device``; on a CPU the work is run again."""
    from tunesmith.engine.graphs import CudaRecorder, PlainRecorder

    return CudaRecorder(torch.device(device)) if device == "cuda" else PlainRecorder()


def check(stage: Stage) -> None:
    """Record both comparisons; ``passes`` is False where one failed, and ``failed`` says how."""
    dtype = "float32" if stage.is_dry else "bfloat16"
    for shape in ("toy-llama", "toy-qwen3") if stage.is_dry else ("toy-qwen3", "135m"):
        stage.record(case=f"steps of {shape}", op="CUDA graph", dtype=dtype, **guarded(partial(_compare, stage, shape)))


def _compare(stage: Stage, shape: str) -> dict[str, Any]:
    from tunesmith.data.collate import DocumentCollator
    from tunesmith.engine.attention import use_document_attention
    from tunesmith.engine.graphs import GraphRunner, PlainRecorder
    from tunesmith.engine.head import LossHead
    from tunesmith.engine.install import install

    dtype = torch.float32 if stage.is_dry else torch.bfloat16
    model = _drawn(models.adapted(models.build(shape, stage.device, dtype))).train()
    base = model.get_base_model()
    use_document_attention(base)
    engine, head = install(base), LossHead(base)
    head.probe()
    graphs = GraphRunner(head, model, recorder_for(stage.device), most_tokens=2**20)
    launched = GraphRunner(head, model, PlainRecorder(), most_tokens=2**20)

    def eager(batch: dict[str, Any], divisor: float) -> torch.Tensor:
        there = {k: v.to(stage.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        loss = head.loss(there, divisor)
        loss.backward()
        return loss.detach()

    ways: dict[str, Callable[..., Any]] = {"graph": graphs.step, "launched": launched.step, "eager": eager}
    worst = {f"{what} beside {way}": 0.0 for way in _ALLOWED for what in ("loss", "gradients")}
    for step in range(_STEPS):
        # Two buckets or more, each with several batches; every second step adds up two of them.
        rows = models.documents(Work("packed", (700, 1500)[step % 2], mean=150), base.config.vocab_size, step)
        batches = [DocumentCollator()(rows)] * (1 + step // 2 % 2)
        found = {name: _outcome(model, way, batches) for name, way in ways.items()}
        for way in _ALLOWED:
            for what, ours, theirs in zip(("loss", "gradients"), found["graph"], found[way], strict=True):
                error = float((ours - theirs).norm() / theirs.norm())
                worst[f"{what} beside {way}"] = max(worst[f"{what} beside {way}"], error)
    results = {
        name: {"rms": error, "allowed": _ALLOWED[name.split()[-1]], "worst": 0.0, "worst_allowed": 0.0}
        for name, error in worst.items()
    }
    is_close = all(np.isfinite(r["rms"]) and r["rms"] <= r["allowed"] for r in results.values())
    return {
        "passes": is_close and graphs.off is None and graphs.replayed > 0 and not engine.notes,
        "results": results,
        "graphs": graphs.counts(),
        **({} if graphs.off is None else {"failed": graphs.off}),
    }


@torch.no_grad()
def _drawn(model: Any) -> Any:
    """Fill B too, so that every gradient says something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def _outcome(model: Any, way: Callable[..., Any], batches: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of an optimizer step, and all gradients as one vector, in float64."""
    model.zero_grad(set_to_none=True)
    losses = [way(batch, _DIVISOR) for batch in batches]
    if any(loss is None for loss in losses):
        raise RuntimeError("the step was not computed")
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.stack([loss.double() for loss in losses]).sum()[None], torch.cat(grads)
