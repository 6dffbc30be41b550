"""The negative log-likelihood that a model gives to the trained tokens of rows, for perplexity.

The tokens are the same ones that training would learn from: the rows go through the same encoder. One document at a
time and no padding; logits exist only for the positions that predict a trained token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.types import Document
from tunesmith.engine.host import compute_device
from tunesmith.engine.modes import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["row_losses"]

_LOGITS_AT_ONCE = 32_000_000  # float32 entries of one slice of the log-softmax: 128 MB


def row_losses(
    model: PreTrainedModel,
    rows: Sequence[Sequence[Document]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[float], list[int]]:
    """Return each row's summed negative log-likelihood (float32 log-softmax) and its number of trained tokens.

    A row is the documents that ``data.masks.ExampleEncoder`` makes of it.
    """
    losses: list[float] = []
    tokens: list[int] = []
    with evaluation_mode(model):
        for done, documents in enumerate(rows, 1):
            parts = [_document_loss(model, document) for document in documents]
            losses.append(sum(loss for loss, _ in parts))
            tokens.append(sum(count for _, count in parts))
            if progress is not None:
                progress(done, len(rows))
    return losses, tokens


def _document_loss(model: PreTrainedModel, document: Document) -> tuple[float, int]:
    """Return the summed loss of one document's trained tokens and their number."""
    import torch

    # The first token has nothing before it and cannot be predicted.
    targets = np.flatnonzero(document.trained[1:]) + 1
    if len(targets) == 0:
        return 0.0, 0
    device = compute_device(model)
    ids = torch.as_tensor(document.input_ids, dtype=torch.long, device=device)
    predicting = torch.as_tensor(targets - 1, device=device)
    with torch.no_grad():
        # ``logits_to_keep`` leaves softcaps and scales of the vocabulary projection to the model itself.
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=predicting).logits[0]
        if len(logits) == len(ids) != len(predicting):
            logits = logits[predicting]  # a model that takes no positions and returned every row
        rows_at_once = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
        losses = [
            torch.nn.functional.cross_entropy(part.float(), wanted, reduction="sum")
            for part, wanted in zip(logits.split(rows_at_once), ids[predicting + 1].split(rows_at_once), strict=True)
        ]
    return float(torch.stack(losses).double().sum()), len(targets)
