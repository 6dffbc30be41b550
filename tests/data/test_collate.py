"""The joined batch, compared with the plain per-document definition of next-token training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunesmith.core.errors import DataError
from tunesmith.data.collate import DocumentCollator


def feature(ids, labels, lengths=None):
    made = {"input_ids": np.array(ids, dtype=np.int32), "labels": np.array(labels, dtype=np.int32)}
    return made if lengths is None else {**made, "lengths": lengths}


def test_known_batch():
    batch = DocumentCollator()(
        [feature([5, 6, 7], [-100, 6, 7]), feature([8, 9, 2, 3, 4], [8, -100, 2, 3, -100], lengths=[2, 3])]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert batch["max_length"] == 3 and type(batch["max_length"]) is int
    # labels 8 and 2 stand first in their documents: nothing predicts them
    assert batch["rows"].tolist() == [0, 1, 5]
    assert batch["targets"].tolist() == [6, 7, 3]
    assert batch["cu_seqlens"].dtype == torch.int32
    for name in ("input_ids", "position_ids", "rows", "targets"):
        assert batch[name].dtype == torch.int64


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition_on_random_documents(seed):
    random = np.random.default_rng(seed)
    documents = []
    for length in random.integers(1, 12, size=7):
        ids = random.integers(0, 4, size=length)  # few ids: the padding id of a tokenizer may occur anywhere
        documents.append((ids, np.where(random.random(length) < 0.5, ids, -100)))
    joined = [
        {"input_ids": np.concatenate([ids for ids, _ in part]), "labels": np.concatenate([lab for _, lab in part])}
        | {"lengths": [len(ids) for ids, _ in part]}
        for part in (documents[:3], documents[3:4], documents[4:])
    ]
    batch = DocumentCollator()(joined)
    offset, rows, targets = 0, [], []
    for ids, labels in documents:
        for position in range(len(ids) - 1):
            if labels[position + 1] != -100:
                rows.append(offset + position)
                targets.append(ids[position + 1])
        offset += len(ids)
    assert batch["rows"].tolist() == rows
    assert batch["targets"].tolist() == targets
    lengths = [len(ids) for ids, _ in documents]
    assert batch["cu_seqlens"].tolist() == [0, *np.cumsum(lengths).tolist()]
    assert batch["position_ids"][0].tolist() == [position for length in lengths for position in range(length)]
    assert batch["max_length"] == max(lengths)


def test_grouping_of_documents_into_features_does_not_matter():
    single = [feature([1, 2], [-100, 2]), feature([3], [3]), feature([4, 5, 6], [4, 5, 6])]
    together = [feature([1, 2, 3, 4, 5, 6], [-100, 2, 3, 4, 5, 6], lengths=[2, 1, 3])]
    for name, value in DocumentCollator()(single).items():
        other = DocumentCollator()(together)[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_works_in_a_data_loader():
    data = [feature([1, 2, 3], [-100, 2, 3]) for _ in range(5)]
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=DocumentCollator())
    assert [batch["cu_seqlens"].tolist() for batch in loader] == [[0, 3, 6], [0, 3, 6], [0, 3]]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([], "a batch holds no document"),
        ([feature([1, 2], [1])], "feature 0 has 2 input_ids but 1 labels"),
        (
            [feature([1], [1]), feature([1, 2], [1, 2], [1])],
            "feature 1 has 2 input_ids but document lengths [1] with sum 1",
        ),
        ([feature([1, 2], [1, 2], [2, 0])], "lengths must be at least 1 and add up to the tokens"),
        ([feature([], [])], "lengths must be at least 1"),
    ],
)
def test_features_that_do_not_fit_together(features, expected):
    with pytest.raises(DataError) as caught:
        DocumentCollator()(features)
    assert expected in str(caught.value)


def test_rounding_adds_one_document_that_trains_nothing():
    features = [
        {"input_ids": np.array([5, 6, 7]), "labels": np.array([-100, 6, 7]), "where": ["a"]},
        {"input_ids": np.array([8, 9]), "labels": np.array([-100, 9]), "where": ["b"]},
    ]
    plain, rounded = DocumentCollator()(features), DocumentCollator(multiple=8)(features)
    assert rounded["input_ids"].shape == (1, 8)
    assert rounded["tokens"] == plain["tokens"] == 5
    assert rounded["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert rounded["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    for name in ("rows", "targets"):
        assert rounded[name].tolist() == plain[name].tolist()
    assert rounded["where"] == ["a", "b"]


def test_a_full_axis_is_not_rounded():
    feature = {"input_ids": np.arange(8), "labels": np.arange(8)}
    assert DocumentCollator(multiple=8)([feature])["cu_seqlens"].tolist() == [0, 8]
