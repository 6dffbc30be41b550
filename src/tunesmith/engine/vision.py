"""The loss of a vision-language model on a padded batch, without full logits.

The model runs as transformers wrote it, images and all, up to the hidden states of its language model; from there on
it is :class:`~tunesmith.engine.head.LossHead`: only rows that predict a trained token reach the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.engine.head import LossHead

__all__ = ["VisionHead"]


@dataclass
class VisionHead(LossHead):
    """Loss of batches that :class:`tunesmith.data.vision.ImageCollator` makes.

    Attributes:
        vision: name inside the model of what sees.
        bookkeeping: keys of a batch that are not for the model.
        saw_images: whether a batch with images was computed.
    """

    vision: str = ""
    bookkeeping: tuple[str, ...] = ()
    saw_images: bool = False

    def reaches(self, name: str) -> bool:
        """Say whether the losses so far depend on the parameter ``name``: what sees is used when there are images."""
        return self.saw_images or f"{self.vision}." not in name

    def _probe_joined(self, tokens: torch.Tensor, documents: list[torch.Tensor]) -> None:
        """Documents are padded side by side: nothing is joined."""

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: value for name, value in batch.items() if name not in self.bookkeeping}
        self.saw_images |= len(inputs) > 2  # more than ids and mask
        return {**inputs, "use_cache": False}

    def _trained_hidden(self, batch: dict[str, Any]) -> torch.Tensor:
        hidden = self.model.base_model(**self._inputs(batch)).last_hidden_state
        return hidden.flatten(0, 1)[batch["rows"]]

    def _trained_logits(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.model(**self._inputs(batch)).logits.flatten(0, 1)[batch["rows"]]

    def _hidden_alone(self, document: torch.Tensor) -> torch.Tensor:
        return self.model.base_model(input_ids=document[None], use_cache=False).last_hidden_state[0]
