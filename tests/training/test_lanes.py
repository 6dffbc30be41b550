"""Parts side by side on threads: the same sums in the same order, and one piece wherever a step needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.engine.support import adapted, fused

from tunesmith import SFTConfig, SFTTrainer
from tunesmith.data import parts
from tunesmith.data.collate import DocumentCollator
from tunesmith.data.parts import lanes_of
from tunesmith.engine.install import engine_of
from tunesmith.training.lanes import Lanes, lanes_there

LENGTHS = (60, 50, 30, 20, 45, 25)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, as a CPU with two cores has, whatever the suite runs on; lanes for tiny models too.

    Torch only says so. Two real threads on the products that are not in lanes would wait for each other wherever other
    processes have the cores too, and the tests would take ten times as long; threads of lanes are real in any case.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(parts, "_LEAST_VALUES", 1)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"text": " ".join(f"w{int(x)}" for x in torch.randint(0, 99, (n,), generator=generator))} for n in LENGTHS]


def trainer(folder: Path, model: Any = None, kind: type[SFTTrainer] = SFTTrainer, **changes: Any) -> SFTTrainer:
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 3, "eval_split": 0}
    return kind(
        model=adapted(fused()) if model is None else model,
        processing_class=tiny.tiny_tokenizer(),
        train_dataset=rows(),
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **{**settings, **changes},
        ),
    )


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of lanes of every part that ran in lanes."""
    found: list[int] = []
    own = Lanes.step

    def step(self: Lanes, loss_of: Any, batches: Any, parameters: Any) -> torch.Tensor:
        found.append(len(batches))
        return own(self, loss_of, batches, parameters)

    monkeypatch.setattr(Lanes, "step", step)
    return found


def weights(run: SFTTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def test_a_run_in_lanes_learns_what_a_run_in_one_piece_learns(
    tmp_path: Path, used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trainer(tmp_path / "lanes")
    assert ours.lanes == ours.plan.lanes == 2
    ours.train()
    assert used and set(used) == {2}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    used.clear()
    single = trainer(tmp_path / "single")
    assert single.plan.lanes == 1
    single.train()
    assert not used
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (ours, single)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, weights(single)[name], rtol=1e-3, atol=1e-5)


def test_two_runs_in_lanes_give_the_same_bytes(tmp_path: Path, used: list[int]) -> None:
    runs = [trainer(tmp_path / str(number)) for number in range(3)]
    for run in runs:
        run.train()
    # Documents of one of the six batches take too unequally long at so small a width.
    assert len(used) == len(runs) * 5
    first = weights(runs[0])
    assert all(torch.equal(first[name], weight) for run in runs[1:] for name, weight in weights(run).items())


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (lambda: adapted(fused(), lora_dropout=0.1), {}),
        (lambda: adapted(fused()), {"neftune_noise_alpha": 5.0}),
    ],
    ids=["dropout", "embedding noise"],
)
def test_what_draws_random_numbers_stays_in_one_piece(
    tmp_path: Path, used: list[int], model: Any, changes: dict[str, Any]
) -> None:
    run = trainer(tmp_path, model(), **changes)
    assert run.lanes == 1
    run.train()
    assert not used


def test_layers_that_the_engine_does_not_know_stay_in_one_piece(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    engine = engine_of(run.model)
    assert engine is not None
    engine.plan.unknown[0] = "for this test"
    assert lanes_there(run.model, run.args) == 1


def test_a_loss_of_ones_own_is_called_by_one_thread(tmp_path: Path, used: list[int]) -> None:
    class Own(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    trainer(tmp_path, kind=Own).train()
    assert not used


def test_an_error_in_a_lane_is_the_errors_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)

    def broken(*_: Any) -> torch.Tensor:
        raise ZeroDivisionError("in a lane")

    monkeypatch.setattr(run.head, "loss", broken)
    with pytest.raises(ZeroDivisionError, match="in a lane"):
        run.train()
    assert run._lanes._pool is None


def collated(lengths: tuple[int, ...]) -> dict[str, Any]:
    return DocumentCollator()([{"input_ids": range(n), "labels": range(n), "where": [f"{n}"]} for n in lengths])


def test_lanes_hold_every_document_once_and_are_even() -> None:
    batch = collated((40, 10, 30, 35))
    lanes = lanes_of(batch, 2, width=64)
    assert sorted(length for lane in lanes for length in lane["lengths"]) == [10, 30, 35, 40]
    assert [sum(lane["lengths"]) for lane in lanes] == [50, 65]
    assert sum(len(lane["rows"]) for lane in lanes) == len(batch["rows"])


@pytest.mark.parametrize("lengths", [(50,), (50, 10), (100, 20, 30)])
def test_uneven_documents_are_left_together(lengths: tuple[int, ...]) -> None:
    batch = collated(lengths)
    assert lanes_of(batch, 2, width=64) == [batch]
