"""Loss scaling: what lets float16 train, whose smallest number is 6e-8 and whose largest is 65,504.

The losses of a step are larger by a power of 2, and so are all gradients on their way through the layers; the sums,
which are float32, are divided by it before anything looks at them (Micikevicius et al. 2018, arXiv:1710.03740). Where
they overflow the paper leaves the step out. Here it is computed again at half the scale, so that every row trains.
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.core.errors import ModelError, NotSupportedYetError

__all__ = ["LossScale", "check_scalable"]

_FIRST = 2.0**16
_STEPS_BEFORE_DOUBLING = 2000


class LossScale:
    """The factor of the losses of float16 weights.

    Attributes:
        factor: what losses are multiplied by.
        steps: steps since it last changed; after 2,000 it doubles.
    """

    def __init__(self) -> None:
        self.factor, self.steps = _FIRST, 0

    def takes(self, gradients: list[torch.Tensor]) -> bool:
        """Divide summed ``gradients`` by the factor and return True; halve it and return False where they overflowed.

        At a factor of 1 they stay as they are: then it is not the scale that makes them infinite.
        """
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        if self.factor > 1 and not torch.isfinite(norms.sum()):
            self.factor, self.steps = self.factor / 2, 0
            return False
        torch._foreach_mul_(gradients, 1 / self.factor)
        self.steps += 1
        if self.steps == _STEPS_BEFORE_DOUBLING:
            self.factor, self.steps = self.factor * 2, 0
        return True

    def record(self) -> dict[str, float]:
        """Return what a run that goes on takes over."""
        return {"factor": self.factor, "steps": self.steps}

    def restore(self, record: dict[str, Any]) -> None:
        """Go on where :meth:`record` was made."""
        self.factor, self.steps = float(record["factor"]), int(record["steps"])


def check_scalable(trainer: Any) -> None:
    """Refuse what float16 cannot train with scaled losses.

    Raises:
        ModelError: weights that train are float16 themselves.
        NotSupportedYetError: the trainer has a ``compute_loss`` of the user's own, whose gradients nobody scales.
    """
    for name, parameter in trainer.trainable():
        if parameter.dtype == torch.float16:
            raise ModelError(
                f"{name} trains and is float16, where most of what a step adds would be rounded away. Load the model "
                "with dtype='float32' (or 'bfloat16'); an adapter of get_peft_model on a float16 base is float32."
            )
    if not type(trainer).compute_loss.__module__.startswith("tunesmith."):
        raise NotSupportedYetError(
            "a compute_loss of your own on a float16 model is not supported yet: its gradients would not be scaled. "
            "Load the model with dtype='float32' (or 'bfloat16')."
        )
