"""A micro-batch in parts: nothing lost, nothing twice, and together the same loss and gradients."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.engine.support import adapted, base_of, fused

from tunesmith.data.collate import IGNORED, DocumentCollator
from tunesmith.data.parts import even_shares, lanes_of, split_batch
from tunesmith.engine.head import LossHead


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    share = draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    features = []
    for number, length in enumerate(lengths):
        ids = random.integers(0, 300, length)
        labels = np.where(random.random(length) < share, ids, IGNORED)
        features.append({"input_ids": ids, "labels": labels, "where": [f"row {number}"]})
    return DocumentCollator(draw(st.sampled_from([1, 8])))(features)


def trained_pairs(batch: dict[str, Any]) -> list[tuple[int, tuple[int, ...]]]:
    """Return every trained target with all tokens of its document before it: what the loss depends on."""
    ids, bounds = batch["input_ids"][0].tolist(), batch["cu_seqlens"].tolist()
    pairs = []
    for row, target in zip(batch["rows"].tolist(), batch["targets"].tolist(), strict=True):
        start = max(bound for bound in bounds if bound <= row)
        pairs.append((target, tuple(ids[start : row + 1])))
    return sorted(pairs)


def longest_trained(batch: dict[str, Any]) -> list[int]:
    """Return the tokens of each document that its trained targets depend on, and 1."""
    rows, found = batch["rows"].tolist(), [1]
    for start, end in pairwise(batch["cu_seqlens"].tolist()):
        found += [row - start + 2 for row in rows if start <= row < end]
    return found


@settings(max_examples=150, deadline=None)
@given(batch=batches(), most=st.integers(1, 120), multiple=st.sampled_from([1, 8]))
def test_every_trained_token_is_there_once_with_its_context(batch: dict[str, Any], most: int, multiple: int) -> None:
    parts = split_batch(batch, most, multiple=multiple)
    assert sorted(pair for part in parts for pair in trained_pairs(part)) == trained_pairs(batch)
    assert sum(part["tokens"] for part in parts) == batch["tokens"]
    whole = {tuple(batch["input_ids"][0, a:b].tolist()) for a, b in pairwise(batch["cu_seqlens"].tolist())}
    for part in parts:
        assert part.keys() == batch.keys()
        assert part["where"] == batch["where"]
        count = part["input_ids"].shape[1]
        assert count == sum(part["lengths"]) == part["cu_seqlens"][-1]
        assert count % multiple == 0
        assert part["max_length"] == max(part["lengths"])
        # A document that is longer than the limit sets it.
        assert count <= -(-max(most, *longest_trained(batch)) // multiple) * multiple
        for start, end in pairwise(part["cu_seqlens"].tolist()):
            assert part["position_ids"][0, start:end].tolist() == list(range(end - start))
            kept = tuple(part["input_ids"][0, start:end].tolist())
            # The beginning of a document of the batch, or the idle tokens behind the last one.
            assert any(kept == one[: len(kept)] for one in whole) or not any(kept)


@settings(max_examples=30, deadline=None)
@given(batch=batches(), most=st.integers(1, 120))
def test_parts_are_the_same_every_time_and_about_equal(batch: dict[str, Any], most: int) -> None:
    first, again = split_batch(batch, most), split_batch(batch, most)
    assert len(first) == len(again)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["rows"], other["rows"])
    loads = [part["input_ids"].shape[1] for part in first]
    longest = max(length for part in first for length in part["lengths"])
    assert max(loads) - min(loads) <= longest


def test_a_batch_below_the_limit_stays_one() -> None:
    batch = DocumentCollator()([{"input_ids": np.arange(9), "labels": np.arange(9)}] * 3)
    (part,) = split_batch(batch, 27)
    assert torch.equal(part["rows"], batch["rows"])
    assert torch.equal(part["input_ids"], batch["input_ids"])


def test_tokens_behind_the_last_label_are_left_out() -> None:
    labels = np.full(20, IGNORED)
    labels[5] = 7
    (part,) = split_batch(DocumentCollator()([{"input_ids": np.arange(20), "labels": labels}]), 100)
    assert part["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert part["rows"].tolist() == [4]
    assert part["targets"].tolist() == [7]


def test_a_batch_without_labels_is_one_token() -> None:
    batch = DocumentCollator()([{"input_ids": np.arange(20), "labels": np.full(20, IGNORED)}])
    (part,) = split_batch(batch, 5)
    assert part["input_ids"].shape == (1, 1)
    assert len(part["rows"]) == 0
    assert part["tokens"] == 20


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("most", [1, 20, 45])
def test_loss_and_gradients_of_the_parts_sum_to_those_of_the_batch(family: str, most: int) -> None:
    model = adapted(fused(family)).double()
    random = np.random.default_rng(0)
    features = []
    for length in (9, 2, 17, 1, 23, 4):
        ids = random.integers(0, tiny.VOCABULARY, length)
        features.append({"input_ids": ids, "labels": np.where(random.random(length) < 0.5, ids, IGNORED)})
    batch = DocumentCollator()(features)
    head, total = LossHead(base_of(model)), len(batch["rows"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = head.loss(batch, total)
    exact = torch.autograd.grad(loss, parameters)
    summed = 0.0
    parts = split_batch(batch, most)
    assert len(parts) > 1
    for part in parts:
        own = head.loss(part, total)
        own.backward()
        summed += own.item()
    assert summed == pytest.approx(loss.item(), rel=1e-12)
    for parameter, gradient in zip(parameters, exact, strict=True):
        assert parameter.grad is not None
        assert float((parameter.grad - gradient).norm()) <= 1e-9 * float(gradient.norm())


def test_shares_are_evened_by_exchanging_entries() -> None:
    # Placed one after the other, the largest first, they would be 16 and 14: 8 4 4 and 7 7.
    assert even_shares([8, 7, 7, 4, 4], 2) == [[1, 3, 4], [0, 2]]
    generator, found, possible = random.Random(0), 0.0, 0.0
    for _ in range(200):
        sizes = [generator.lognormvariate(5, 0.9) for _ in range(8)]
        shares = even_shares(sizes, 2)
        best = min(max(part, sum(sizes) - part) for part in map(sum, powerset(sizes)))
        if shares is None:
            assert best > 0.55 * sum(sizes)
            continue
        assert sorted(index for share in shares for index in share) == list(range(8))
        found += max(sum(sizes[index] for index in share) for share in shares)
        possible += best
    assert possible <= found < 1.01 * possible


def powerset(sizes: list[float]) -> Iterator[tuple[float, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(sizes, count) for count in range(len(sizes) + 1))


def test_a_long_document_counts_for_more_than_its_tokens() -> None:
    documents = [{"input_ids": range(n), "labels": range(n), "where": [f"{n}"]} for n in (400, 100, 100, 100, 100)]
    batch = DocumentCollator()(documents)
    assert {tuple(lane["lengths"]) for lane in lanes_of(batch, 2, width=4096)} == {(400,), (100,) * 4}
    # Four widths of tokens before a token take as long as all else: 400 (1 + 1) beside 4 * 100 (1 + 1/4) is too uneven.
    assert lanes_of(batch, 2, width=100) == [batch]
