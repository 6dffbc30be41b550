"""Sums over the processes of a run, and what it means when one of them is gone."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tunesmith.core.errors import TrainingError

__all__ = ["gather_objects", "naming_lost_processes", "sum_gradients", "sum_over_processes", "wait_for_processes"]


def sum_over_processes(value: torch.Tensor, processes: int) -> torch.Tensor:
    """Sum ``value`` in place over all processes and return it."""
    if processes > 1:
        torch.distributed.all_reduce(value)
    return value


def sum_gradients(parameters: list[torch.nn.Parameter], processes: int) -> None:
    """Sum the gradients of ``parameters`` over all processes, in one float32 message."""
    if processes == 1:
        return
    for parameter in parameters:
        # A process whose documents did not reach a weight still takes part in its sum.
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = sum_over_processes(torch.cat([grad.reshape(-1).float() for grad in grads]), processes)
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def gather_objects(value: Any, processes: int) -> list[Any]:
    """Return the value of every process, in the order of their ranks."""
    if processes == 1:
        return [value]
    gathered: list[Any] = [None] * processes
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def wait_for_processes(args: Any) -> None:
    """Return when every process of the run with these ``TrainingArguments`` has come here.

    accelerate's own asks each process for the GPU of its number, also in a run on the CPU, and fails there where the
    machine has fewer GPUs than the run has processes.
    """
    if args.world_size > 1:
        sum_over_processes(torch.zeros(1, device=args.device), args.world_size).item()


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Say what it means when torch.distributed fails in the middle of a run; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        frames = traceback.walk_tb(error.__traceback__)
        if not any(frame.f_globals.get("__name__") == "torch.distributed.distributed_c10d" for frame, _ in frames):
            raise
        raise TrainingError(
            f"another process of this run died or stopped answering ({str(error).splitlines()[0]}). "
            "Its own output says why; start all processes again with --resume."
        ) from error
