"""An embedding in host memory: its rows are looked up there and copied to where the layers compute.

For models with large vocabularies on a GPU: a frozen embedding is read at T rows a step, and the matrix need not lie in
the GPU's memory for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["check_not_tied", "compute_device", "is_on_host", "keep_on_host"]


class _OnHost:
    """In front of an embedding's class: the matrix stays on the host wherever the model goes.

    Attributes:
        computes_on: the device of the layers behind it.
    """

    weight: torch.Tensor
    computes_on: torch.device

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows (..., D) of the ids ``input`` (...) on the device that computes."""
        return super().forward(input.to(self.weight.device)).to(self.computes_on)  # type: ignore[misc]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # An empty tensor shows where the model goes, so that the matrix does not have to go there first.
        shown = fn(self.weight.new_empty(0))
        self.computes_on = shown.device
        return super()._apply(  # type: ignore[misc]
            lambda value: value.to(shown.dtype) if value.is_floating_point() else value, recurse
        )


def check_not_tied(config: Any) -> None:
    """Refuse a model whose output head is its embedding.

    Raises:
        ModelError: it is.
    """
    if config.get_text_config().tie_word_embeddings:
        raise ModelError(
            "offload_embedding=True: embedding and output head of this model are one tensor, and the head multiplies "
            "by all of it in every step, so it has to lie where the model computes. Leave offload_embedding out."
        )


def keep_on_host(model: Any, computes_on: torch.device) -> None:
    """Keep the embedding matrix of ``model`` where it lies for good; the layers behind it are on ``computes_on``."""
    embedding = model.get_input_embeddings()
    kind = type(embedding)
    embedding.computes_on = computes_on
    embedding.__class__ = type(kind.__name__, (_OnHost, kind), {"__module__": __name__})


def compute_device(model: Any) -> torch.device:
    """Return where ``model`` takes its inputs and the layers behind its embedding compute."""
    embedding = model.get_input_embeddings()
    return embedding.computes_on if is_on_host(embedding) else embedding.weight.device


def is_on_host(module: Any) -> bool:
    """Return whether ``module`` is an embedding that :func:`keep_on_host` keeps there."""
    return isinstance(module, _OnHost)
