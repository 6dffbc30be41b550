"""Put a model into evaluation mode for a block, and back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["adapter_disabled", "evaluation_mode"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and checkpointing off; afterwards every module is in the mode it was in.

    Gradients are the caller's affair. ``torch.inference_mode`` would be a trap for them: a buffer that the model makes
    on the way (a longer RoPE table, say) could not take part in training afterwards.
    """
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """Switch the adapter of a PEFT model off for the block.

    PEFT marks the adapter's weights as trainable when it switches them on again, also where they were frozen before;
    so what was trainable is noted and put back.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, was_trainable in trainable:
            parameter.requires_grad_(was_trainable)
