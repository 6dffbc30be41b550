"""A micro-batch cut into smaller ones that together give the same loss and gradients.

On a CPU a forward and backward over 512 tokens runs at the same rate as over 4,096 and keeps an eighth: so the batch
size that a user asks for and the tokens that are computed together are two different things. Documents are whole in
each part. Tokens behind the last one that predicts something trained are left out: nothing depends on them.

A part may be cut once more, into lanes that threads compute side by side (``training/lanes.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.data.collate import IGNORED, DocumentCollator

__all__ = ["even_shares", "lanes_of", "share_documents", "split_batch"]

# A lane that has more than its share by this is not worth it: the others wait. One thread for each of two equal lanes
# takes 0.81 of the time that both take together (benchmarks/LOG.md).
_UNEVEN = 1.2
# Values of a lane's hidden states below which a layer is more Python, which runs one thread at a time, than products.
_LEAST_VALUES = 2**16


def split_batch(batch: dict[str, Any], most_tokens: int, *, multiple: int = 1) -> list[dict[str, Any]]:
    """Return batches of about equal size in the form of ``batch``, each of at most ``most_tokens`` or, where one
    document is longer than that, of as many tokens as the longest.

    Documents keep their order inside a part. ``where`` and ``tokens``, which are for messages and counts, stay with
    the first part. ``multiple`` is that of :class:`DocumentCollator`.
    """
    documents = _trained_documents(batch)
    shares = share_documents([len(document["input_ids"]) for document in documents], most_tokens)
    return _collated(batch, documents, shares, multiple)


def lanes_of(batch: dict[str, Any], lanes: int, *, width: int, multiple: int = 1) -> list[dict[str, Any]]:
    """Return ``batch`` as batches that take nearly equally long, or alone where its documents do not allow that.

    ``width`` is that of the hidden states.
    """
    documents = _trained_documents(batch)
    shares = lane_shares([len(document["input_ids"]) for document in documents], lanes, width=width)
    return [batch] if shares is None else _collated(batch, documents, shares, multiple)


def _collated(
    batch: dict[str, Any], documents: list[dict[str, Any]], shares: list[list[int]], multiple: int
) -> list[dict[str, Any]]:
    collate = DocumentCollator(multiple)
    parts = [collate([documents[index] for index in share]) for share in shares]
    for part in parts:
        part["tokens"], part["where"] = 0, batch["where"]
    parts[0]["tokens"] = batch["tokens"]
    return parts


def _trained_documents(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the documents up to their last row with a label; one token without a label where there is none at all."""
    ids, labels = batch["input_ids"][0].numpy(), np.full(batch["input_ids"].shape[1], IGNORED)
    rows = batch["rows"].numpy()
    labels[rows + 1] = batch["targets"].numpy()
    documents: list[dict[str, Any]] = []
    start = 0
    for length in batch["lengths"]:
        own = rows[(rows >= start) & (rows < start + length)]
        if len(own):
            # The last target is kept as a label only: its own hidden state predicts nothing.
            end = int(own[-1]) + 2
            documents.append({"input_ids": ids[start:end], "labels": labels[start:end]})
        start += length
    return documents or [{"input_ids": ids[:1], "labels": labels[:1]}]


def share_documents(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Return indices of documents in the fewest shares found that have at most ``most_tokens``, or the longest one."""
    limit = max(most_tokens, max(lengths))
    count = -(-sum(lengths) // limit)
    while True:
        shares = _spread(lengths, count)
        if max(sum(lengths[index] for index in share) for share in shares) <= limit:
            return [share for share in shares if share]
        count += 1


def lane_shares(lengths: Sequence[int], lanes: int, *, width: int) -> list[list[int]] | None:
    """Return indices of documents in shares that take nearly equally long; None where their lengths do not allow that,
    or all are too short for it.

    ``width`` is that of the hidden states.
    """
    if sum(lengths) * width < lanes * _LEAST_VALUES:
        return None
    # Attention on all tokens before a token takes as long as all else at about 4 widths of them (SmolLM2 on AVX2).
    return even_shares([length * (1 + length / (4 * width)) for length in lengths], lanes)


def even_shares(sizes: Sequence[float], count: int) -> list[list[int]] | None:
    """Return indices in ``count`` shares of nearly equal size, or None where there are none."""
    shares = _spread(sizes, count)
    while _evened(sizes, shares):
        pass
    largest = max(sum(sizes[index] for index in share) for share in shares)
    return None if count * largest > _UNEVEN * sum(sizes) else [sorted(share) for share in shares]


def _spread(sizes: Sequence[float], count: int) -> list[list[int]]:
    """Return indices in ``count`` shares, the largest placed first, each in the share that has the least."""
    loads, shares = [0.0] * count, [list[int]() for _ in range(count)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = loads.index(min(loads))
        loads[least] += sizes[index]
        shares[least].append(index)
    return [sorted(share) for share in shares]


def _evened(sizes: Sequence[float], shares: list[list[int]]) -> bool:
    """Move an entry of the largest share to the smallest, for one of its own or none; False where nothing helps."""
    loads = [sum(sizes[index] for index in share) for share in shares]
    high, low = loads.index(max(loads)), loads.index(min(loads))
    gap = loads[high] - loads[low]
    moves = [(abs(gap - 2 * (sizes[give] - (0 if take is None else sizes[take]))), give, take)
             for give in shares[high] for take in (*shares[low], None)]  # fmt: skip
    left, give, take = min(moves, key=lambda move: move[0])
    if left >= gap * (1 - 1e-9):
        return False
    shares[high].remove(give)
    shares[low].append(give)
    if take is not None:
        shares[low].remove(take)
        shares[high].append(take)
    return True
