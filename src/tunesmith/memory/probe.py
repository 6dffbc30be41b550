"""One real forward and backward whose only trace is what it measured.

Gradients go back to None, random states to what they were, the optimizer is never called: a run that was probed has the
same bytes as one that was not. Buffers that the engine made stay, as they would be made by the first step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import TrainingError
from tunesmith.core.memory import peak_bytes
from tunesmith.engine.host import compute_device

__all__ = ["Probe", "probe_step"]


@dataclass(frozen=True, slots=True)
class Probe:
    """What a step was measured to take.

    Attributes:
        tokens: of the batch.
        seconds: of its forward and backward, the better of two.
        peak: of this process until its end; the optimizer's states are not in it.
    """

    tokens: int
    seconds: float
    peak: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def probe_step(model: Any, backward: Callable[[], Any], tokens: int, *, repeats: int = 2) -> Probe:
    """Call ``backward``, which computes a loss of ``tokens`` tokens on ``model`` and its gradients, and measure it.

    The first call also pays for what a first call makes; the best of ``repeats`` counts.

    Raises:
        TrainingError: the model holds gradients already: they would be lost.
    """
    import torch

    if any(parameter.grad is not None for parameter in model.parameters()):
        raise TrainingError("a probe step needs a model without gradients. Call model.zero_grad() before it.")
    were_training = [module for module in model.modules() if not module.training]
    on_gpu = compute_device(model).type == "cuda"
    best = float("inf")
    with _random_states_kept():
        model.train()
        try:
            for _ in range(repeats):
                began = time.perf_counter()
                backward()
                if on_gpu:
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - began)
                for parameter in model.parameters():
                    parameter.grad = None
        finally:
            for parameter in model.parameters():
                parameter.grad = None
            for module in were_training:
                module.training = False
    return Probe(tokens, max(best, 1e-9), peak_bytes())


@contextmanager
def _random_states_kept() -> Iterator[None]:
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
