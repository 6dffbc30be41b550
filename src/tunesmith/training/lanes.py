"""Parts of a micro-batch computed side by side, each by a share of the CPU's threads.

Two threads on one matrix product wait for each other at its end, and on everything small between products one of them
idles. Two threads with a part of the batch each do not: forward and backward run in lanes, and gradients are added in
the order of the lanes, so that the sums are the same in every run.

Lanes need all that a step draws at random to be drawn before (no dropout, no embedding noise), layers that keep no
state of their own (fused ones), and a CPU with more than one thread. :func:`lanes_there` says how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tunesmith.engine.install import engine_of

__all__ = ["Lanes", "lanes_there", "more_than_sums"]

_LANES = 2


def lanes_there(model: Any, args: Any) -> int:
    """Return how many parts can be computed side by side; 1 where a step has to stay in one piece.

    ``args`` are the training arguments.
    """
    engine = engine_of(model)
    if args.device.type != "cpu" or torch.get_num_threads() < _LANES or args.world_size > 1:
        return 1
    if engine is None or engine.plan.unknown or not engine.plan.known:
        return 1
    return _LANES if more_than_sums(model, args) is None else 1


def more_than_sums(model: Any, args: Any) -> str | None:
    """Return what a step does beside computing sums from weights and tokens, or None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    drops = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    if drops or getattr(base.config.get_text_config(), "attention_dropout", 0.0):
        return "dropout draws other numbers in every step"
    if args.neftune_noise_alpha is not None:
        return "neftune_noise_alpha draws other noise in every step"
    if "lomo" in str(getattr(args.optim, "value", args.optim)):
        return "the optimizer updates weights in the middle of the backward pass"
    return None


class Lanes:
    """Threads that each compute a loss and its gradients; they end with :meth:`close`."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ThreadPoolExecutor | None = None

    def step(
        self,
        loss_of: Callable[[dict[str, Any]], torch.Tensor],
        batches: Sequence[dict[str, Any]],
        parameters: Sequence[torch.nn.Parameter],
    ) -> torch.Tensor:
        """Return the sum of the losses, and add their gradients to those of ``parameters``."""
        if self._pool is None:
            # How many threads an operation may use belongs to the thread that calls it.
            share = max(1, torch.get_num_threads() // self._count)
            self._pool = ThreadPoolExecutor(self._count, "lane", torch.set_num_threads, (share,))

        def compute(batch: dict[str, Any]) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
            loss = loss_of(batch)
            return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

        total = torch.zeros(())
        for loss, grads in self._pool.map(compute, batches):
            total = total + loss
            for parameter, grad in zip(parameters, grads, strict=True):
                if grad is not None and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if grad is not None:
                    parameter.grad += grad  # type: ignore[operator]
        return total

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = None
