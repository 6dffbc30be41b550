"""Vectors of texts from a model for FEATURE_EXTRACTION: the mean of its last hidden states over real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["embed_texts", "mean_pooled"]


def mean_pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``hidden`` (B, T, D) over the tokens where ``mask`` (B, T) is 1, float32 (B, D)."""
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 32) -> torch.Tensor:
    """Return a vector of length 1 for each text, float32 (N, D) on the CPU, as ``TaskTrainer`` trains them.

    A text longer than the model's window is cut there. The model stays in the mode that it was in.
    """
    import torch

    from tunesmith.engine.modes import evaluation_mode
    from tunesmith.models.heads import reads
    from tunesmith.models.load import facts_of

    found: list[torch.Tensor] = []
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(texts), batch_size):
            inputs = tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=facts_of(model).window,
                return_tensors="pt",
            ).to(model.device)
            hidden = model(**{name: value for name, value in inputs.items() if reads(model, name)}).last_hidden_state
            pooled = mean_pooled(hidden, inputs["attention_mask"])
            found.append(torch.nn.functional.normalize(pooled, dim=-1).cpu())
    return torch.cat(found)
