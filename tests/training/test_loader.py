from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tunesmith.training.loader import DocumentBatches, DocumentLoader


def order(count: int, batch_size: int, *, epoch: int = 0, **more: Any) -> list[list[int]]:
    batches = DocumentBatches(count, batch_size, **{"shuffle": True, "seed": 7, **more})
    batches.set_epoch(epoch)
    found = list(batches)
    assert len(batches) == len(found)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_see_what_one_with_their_batch_sees(count: int, processes: int) -> None:
    single = order(count, 2 * processes)
    shares = [order(count, 2, rank=rank, processes=processes) for rank in range(processes)]
    assert {len(share) for share in shares} == {len(single)}
    for step, together in enumerate(single):
        union = [index for share in shares for index in share[step] if index >= 0]
        assert union == together
        # A process that has nothing left gets the document that trains nothing, and only then.
        assert all(share[step] == [-1] or min(share[step]) >= 0 for share in shares)


@pytest.mark.parametrize("count", [1, 5, 12, 13])
def test_an_epoch_is_every_document_once(count: int) -> None:
    for epoch in range(3):
        assert sorted(index for batch in order(count, 4, epoch=epoch) for index in batch) == list(range(count))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert order(30, 4) == order(30, 4)
    assert order(30, 4) != order(30, 4, epoch=1)
    assert order(30, 4) != order(30, 4, seed=8)
    assert order(30, 4, shuffle=False) == [list(range(start, min(start + 4, 30))) for start in range(0, 30, 4)]


def documents(count: int) -> list[dict[str, Any]]:
    return [
        {"input_ids": np.arange(3) + 10 * index, "labels": np.arange(3) + 10 * index, "where": [f"row {index}"]}
        for index in range(count)
    ]


def test_batches_are_joined_documents() -> None:
    loader = DocumentLoader(documents(5), DocumentBatches(5, 2, shuffle=False))
    batches = list(loader)
    joined = [batch["input_ids"][0, : batch["tokens"]].tolist() for batch in batches]
    assert joined[:2] == [[0, 1, 2, 10, 11, 12], [20, 21, 22, 30, 31, 32]]
    assert [batch["input_ids"].shape for batch in batches] == [(1, 64)] * 3
    assert [batch["where"] for batch in batches] == [["row 0", "row 1"], ["row 2", "row 3"], ["row 4"]]


def test_a_process_without_documents_trains_nothing() -> None:
    loader = DocumentLoader(documents(5), DocumentBatches(5, 2, shuffle=False, rank=1, processes=2))
    assert [len(batch["rows"]) for batch in loader] == [4, 0]


def test_the_epoch_reaches_the_sampler_through_the_loader() -> None:
    loader = DocumentLoader(documents(20), DocumentBatches(20, 3, shuffle=True))
    first = [batch["where"] for batch in loader]
    loader.set_epoch(1)
    assert [batch["where"] for batch in loader] != first
    loader.set_epoch(0)
    assert [batch["where"] for batch in loader] == first


def test_skipping_batches_on_resume_keeps_the_order() -> None:
    """What transformers' Trainer does on resume, in an epoch that is not the first."""
    from accelerate import skip_first_batches

    loader = DocumentLoader(documents(20), DocumentBatches(20, 3, shuffle=True))
    loader.set_epoch(2)
    whole = [batch["where"] for batch in loader]
    assert [batch["where"] for batch in skip_first_batches(loader, 4)] == whole[4:]
