"""Buffers and offloaded tensors over many steps: the same bytes, the same memory, and nothing left behind."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.support import POLICIES, adapted, assert_identical, base_of, batch, fused, step

from tunesmith.core.errors import OutputError
from tunesmith.engine import offload
from tunesmith.engine import scratch as scratch_module
from tunesmith.engine.install import engine_of
from tunesmith.engine.offload import HostStore
from tunesmith.engine.policies import Policy
from tunesmith.engine.scratch import Scratch


def offloading(folder: Path | None = None) -> Any:
    model = adapted(fused())
    engine_of(model).store = HostStore(folder)
    engine_of(model).set_policy(Policy.OFFLOAD)
    return model


# ---- scratch ----


def test_a_buffer_grows_and_is_used_again() -> None:
    scratch, like = Scratch(), torch.zeros(1)
    first = scratch("a", like, 4, 8)
    assert scratch("a", like, 8, 2).data_ptr() == first.data_ptr()
    assert scratch("b", like, 4, 8).data_ptr() != first.data_ptr()
    assert scratch("a", like.double(), 4, 8).dtype == torch.float64
    assert scratch("a", like, 5, 8).shape == (5, 8)
    assert scratch("a", like, 0, 8).shape == (0, 8)
    assert scratch.nbytes() == 4 * 40 + 4 * 32 + 8 * 32
    scratch.clear()
    assert scratch.nbytes() == 0


def test_what_is_lent_comes_back_with_its_loan() -> None:
    scratch, like = Scratch(), torch.zeros(1)
    first, second = scratch.lend(), scratch.lend()
    places = [loan(like, 4, 8).data_ptr() for loan in (first, second)]
    assert places[1] == places[0] + 128 and scratch.blocks() == (1, 1)
    del first
    assert scratch.lend()(like, 4, 8).data_ptr() == places[1] + 128  # the second is still lent
    del second
    assert scratch.blocks() == (1, 0)
    again = scratch.lend()
    assert again(like, 9, 8).data_ptr() == places[0]
    scratch.clear()
    assert scratch.blocks() == (0, 0)


def test_a_loan_that_stays_holds_its_block_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_module, "_BLOCK", 256)
    scratch, like = Scratch(), torch.zeros(1)
    stays = scratch.lend()
    kept = stays(like, 32).fill_(7)
    for _ in range(20):
        passing = scratch.lend()
        for size in (32, 48, 100):
            passing(like, size).zero_()
        del passing
    assert bool((kept == 7).all())
    count, lent = scratch.blocks()
    assert count <= 4 and lent == 1


def test_a_graph_that_lives_on_keeps_what_it_was_lent() -> None:
    model, given = adapted(fused()), batch(11, 5)
    engine_of(model).set_policy(Policy.NONE)
    expected = step(model, given)
    model.zero_grad()
    loss = model(**given).loss
    step(model, batch(30, 4, seed=9))  # would write over buffers that had come back
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, expected[f"gradient of {name}"])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_step_gives_the_same_bytes_whatever_was_in_the_buffers(policy: Policy) -> None:
    model = adapted(fused("gemma3"))
    engine = engine_of(model)
    engine.set_policy(policy)
    first = step(model)
    step(model, batch(30, 4, seed=9))
    for buffer in engine.scratch._buffers.values():
        buffer.fill_(float("nan"))
    assert_identical(step(model), first)


@pytest.mark.parametrize("policy", [Policy.NONE, Policy.SEL_MIN, Policy.OFFLOAD])
def test_memory_is_flat_over_many_steps(policy: Policy) -> None:
    """200 steps: buffers of the engine, and everything that Python keeps alive."""
    model = adapted(fused(num_hidden_layers=1), target_modules=["q_proj", "down_proj"])
    engine = engine_of(model)
    engine.set_policy(policy)
    batches = [batch(9), batch(4), batch(17)]

    def alive(steps: int) -> tuple[int, int]:
        for number in range(steps):
            model.zero_grad(set_to_none=True)
            model(**batches[number % 3]).loss.backward()
        gc.collect()
        return engine.scratch.nbytes(), len(gc.get_objects())

    alive(10)
    (buffers, before), (after_buffers, after) = alive(10), alive(200)
    assert after_buffers == buffers
    assert after - before < 100


# ---- offloading ----


def size_of(model: Any) -> int:
    file = engine_of(model).store._file
    return os.fstat(file._file.fileno()).st_size


def test_slots_are_used_again(tmp_path: Path) -> None:
    model = offloading(tmp_path)
    first = step(model)
    size = size_of(model)
    assert size > 0
    for _ in range(5):
        assert_identical(step(model), first)
    assert size_of(model) == size


def test_the_file_does_not_grow_with_every_length_that_was_seen(tmp_path: Path) -> None:
    model = offloading(tmp_path)
    step(model, batch(500))
    size = size_of(model)
    for length in range(20, 480, 40):
        step(model, batch(length))
    assert size_of(model) == size


def test_several_forwards_before_their_backwards(tmp_path: Path) -> None:
    """As with a preference loss, or gradient accumulation gone wrong: nothing is written over."""
    model = offloading(tmp_path)
    given = [batch(9, 4, seed=seed) for seed in range(3)]
    expected = [step(model, one) for one in given]
    losses = [model(**one).loss for one in given]
    for number in (1, 2, 0):
        model.zero_grad(set_to_none=True)
        losses[number].backward()
        found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_identical(found, {name: v for name, v in expected[number].items() if name.startswith("gradient")})
    step(model, batch(3))
    assert_identical(step(model, given[0]), expected[0])


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    model = offloading(tmp_path)
    step(model)
    assert list(tmp_path.iterdir()) == []
    engine_of(model).revert()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 5), (700, 33)], ids=str)
def test_what_was_put_away_comes_back(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    store = HostStore()
    x = torch.randn(shape).to(dtype)
    strided = torch.randn(shape[::-1]).to(dtype).t()
    tickets = [store.put(x), store.put(strided), store.put(x + 1)]
    for ticket, expected in zip(tickets, (x, strided, x + 1), strict=True):
        for _ in range(2):
            assert torch.equal(store.get(ticket), expected)
    store.close()
    store.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only, as root sees it nowhere but on a read-only file system."""

    def refuse(dir: Any = None) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"temporary_location .* cannot be written: .*Read-only file system"):
        step(offloading(tmp_path))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        step(offloading(tmp_path / "file"))


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, needed: int, purpose: str) -> None:
        raise OutputError(f"{purpose}: no space in {folder}")

    monkeypatch.setattr(offload, "require_space", full)
    with pytest.raises(OutputError, match="offloading the inputs of decoder layers: no space in "):
        step(offloading(tmp_path))


def test_a_dropped_forward_frees_its_slots(tmp_path: Path) -> None:
    model = offloading(tmp_path)
    model(**batch(9))
    file = engine_of(model).store._file
    gc.collect()
    assert file._used == 0
    assert base_of(model) is engine_of(model).model
