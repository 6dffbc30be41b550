"""Documents of one micro-batch, joined on one token axis without padding.

Everything that a step would otherwise have to ask the device about is computed here on the host with numpy: where
documents begin, which positions predict a trained token, and what those tokens are. Lengths decide where a document
ends; token ids never do (for some tokenizers the padding token is also the end of turn).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.core.errors import DataError

__all__ = ["IGNORED", "DocumentCollator"]

IGNORED = -100
"""The label of a token that is not trained, as everywhere in transformers."""


class DocumentCollator:
    """Callable for a torch ``DataLoader`` or the transformers ``Trainer``.

    Takes a list of features ``{"input_ids": (T,), "labels": (T,), "lengths": [int, ...]}``: labels are not shifted and
    are -100 where untrained; ``lengths`` are those of the documents in the feature (one document if absent).

    Returns, for N trained tokens in D documents of T tokens together:

    ============== ============= ======================================================================
    input_ids      (1, T) int64
    position_ids   (1, T) int64  from 0 in each document
    cu_seqlens     (D+1,) int32  where documents begin, and T
    lengths        list of int   tokens of each document
    max_length     int           tokens of the longest document
    tokens         int           tokens of the documents: T less what rounding added
    rows           (N,) int64    positions whose next token is trained; never the last of a document
    targets        (N,) int64    those next tokens
    where          list of str   the source row of each document, for messages (only of features that have it)
    ============== ============= ======================================================================

    ``multiple`` rounds T up with one more document, which trains nothing: matrix libraries prepare a kernel for every
    new shape, and on a CPU in bfloat16 that costs more time and memory than some idle tokens.
    """

    def __init__(self, multiple: int = 1) -> None:
        self._multiple = multiple

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join ``features``; see the class.

        Raises:
            DataError: no features, lengths that do not add up to the tokens, or labels of another length.
        """
        import torch

        if not features:
            raise DataError("a batch holds no document. Give the collator at least one feature.")
        for index, feature in enumerate(features):
            _check(feature, index)
        ids = np.concatenate([np.asarray(feature["input_ids"], dtype=np.int64) for feature in features])
        labels = np.concatenate([np.asarray(feature["labels"], dtype=np.int64) for feature in features])
        lengths = np.concatenate([np.asarray(_lengths(feature), dtype=np.int64) for feature in features])
        tokens = len(ids)
        idle = -tokens % self._multiple
        if idle:
            ids = np.concatenate([ids, np.zeros(idle, dtype=np.int64)])
            labels = np.concatenate([labels, np.full(idle, IGNORED)])
            lengths = np.append(lengths, idle)
        ends = np.cumsum(lengths)
        starts = ends - lengths

        trained = labels != IGNORED
        trained[starts] = False  # nothing of the same document stands before its first token
        targets_at = np.flatnonzero(trained)
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(np.arange(len(ids)) - np.repeat(starts, lengths))[None],
            "cu_seqlens": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            "lengths": lengths.tolist(),
            "max_length": int(lengths.max()),
            "tokens": tokens,
            "rows": torch.from_numpy(targets_at - 1),
            "targets": torch.from_numpy(labels[targets_at]),
            "where": [place for feature in features for place in feature.get("where", ())],
        }


def _lengths(feature: Mapping[str, Any]) -> Sequence[int]:
    lengths = feature.get("lengths")
    return [len(feature["input_ids"])] if lengths is None else lengths


def _check(feature: Mapping[str, Any], index: int) -> None:
    tokens, labels, lengths = len(feature["input_ids"]), len(feature["labels"]), list(_lengths(feature))
    if labels != tokens:
        raise DataError(f"feature {index} has {tokens} input_ids but {labels} labels; there must be one label a token.")
    if not lengths or min(lengths) < 1 or sum(lengths) != tokens:
        raise DataError(
            f"feature {index} has {tokens} input_ids but document lengths {lengths[:8]} with sum {sum(lengths)}; "
            "lengths must be at least 1 and add up to the tokens."
        )
