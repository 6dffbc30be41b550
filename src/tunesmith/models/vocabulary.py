"""A larger vocabulary: rows for tokens that the model has never seen, in embedding and output head."""

from __future__ import annotations

from typing import Any

from tunesmith.core.errors import ModelError

__all__ = ["check_vocabulary", "grow_vocabulary"]


def check_vocabulary(size: int, *, tokens: int, rows: int) -> None:
    """Refuse a vocabulary of ``size`` rows for a tokenizer of ``tokens`` and a model of ``rows``.

    Raises:
        ModelError: it is smaller than either.
    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise ModelError(f"resize_model_vocab={size!r} must be a whole number of rows.")
    if size < tokens:
        raise ModelError(
            f"resize_model_vocab={size} is smaller than the tokenizer, which has {tokens} tokens. Give at least that."
        )
    if size < rows:
        raise ModelError(
            f"resize_model_vocab={size} is smaller than the model's vocabulary of {rows} rows, and a vocabulary only "
            "grows. Give more, or leave it out."
        )


def grow_vocabulary(model: Any, size: int) -> None:
    """Give embedding and output head of ``model`` ``size`` rows in place; new ones are the mean of the old.

    Tied matrices stay tied. New tokens are alike until they train: modules_to_save=["embed_tokens", "lm_head"].
    """
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size, mean_resizing=False)
    head = model.get_output_embeddings()
    ends = {id(module.weight): module.weight for module in (model.get_input_embeddings(), head) if module is not None}
    matrices = [*ends.values(), *([head.bias] if getattr(head, "bias", None) is not None else [])]
    with torch.no_grad():
        for matrix in matrices:
            matrix[rows:] = matrix[:rows].float().mean(0).to(matrix.dtype)
