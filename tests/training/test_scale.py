"""float16 weights: losses are scaled, a step that overflows is computed again, and what cannot be scaled is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training import support

from tunesmith import SFTTrainer
from tunesmith.core.device import dtype_to_train
from tunesmith.core.errors import ModelError, NotSupportedYetError, SettingsError, TrainingError
from tunesmith.training import scale
from tunesmith.training.scale import LossScale


def test_gradients_are_divided_and_an_overflow_halves_the_factor() -> None:
    of_losses, gradient = LossScale(), torch.tensor([2.0**16, 2.0**17])
    assert of_losses.takes([gradient])
    assert gradient.tolist() == [1.0, 2.0]
    for broken in (float("inf"), float("nan")):
        gradient = torch.tensor([1.0, broken])
        assert not of_losses.takes([torch.ones(3), gradient])
        assert gradient[0] == 1  # not divided: it is computed again
    assert of_losses.record() == {"factor": 2.0**14, "steps": 0}


def test_the_factor_doubles_after_two_thousand_steps() -> None:
    of_losses = LossScale()
    of_losses.restore({"factor": 8, "steps": 1999})
    gradient = torch.tensor([8.0])
    assert of_losses.takes([gradient])
    assert (gradient.item(), of_losses.record()) == (1, {"factor": 16, "steps": 0})


def test_infinite_without_a_scale_is_not_computed_again() -> None:
    of_losses = LossScale()
    of_losses.restore({"factor": 1, "steps": 0})
    assert of_losses.takes([torch.tensor([float("inf")])])


def trained(folder: Path, dtype: torch.dtype, **settings: Any) -> Any:
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "no", **settings}
    trainer = support.trainer(folder, model=support.adapted(dtype=dtype), **settings)
    trainer.train()
    return trainer


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("first", [2.0**16, 2.0**40], ids=["as it is", "overflows at first"])
def test_float16_learns_as_float32_does(first: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_FIRST", first)
    half, whole = trained(tmp_path / "half", torch.float16), trained(tmp_path / "whole", torch.float32)
    assert losses_of(half) == pytest.approx(losses_of(whole), rel=2e-3)
    assert half.model.dtype == torch.float16
    ours, theirs = support.trainable(half.model), support.trainable(whole.model)
    assert {weight.dtype for weight in ours.values()} == {torch.float32}
    assert all(torch.cosine_similarity(ours[n].flatten(), theirs[n].flatten(), 0) > 0.99 for n in theirs)
    assert (half._scale.factor < first) == (first > 2.0**16)


def test_gradients_that_float16_cannot_show_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One of very many trained tokens: its gradient is below 6e-8 on the way.
    grads: dict[str, torch.Tensor] = {}
    for name, first in (("scaled", 2.0**16), ("plain", 1.0)):
        monkeypatch.setattr(scale, "_FIRST", first)
        trainer = support.trainer(tmp_path / name, model=support.adapted(dtype=torch.float16), max_steps=1)
        monkeypatch.setattr(trainer, "check_gradients", lambda places, trainer=trainer, name=name: grads.update(
            {name: torch.cat([p.grad.flatten() for _, p in trainer.trainable()])}))  # fmt: skip
        own = trainer.get_batch_samples
        monkeypatch.setattr(
            trainer, "get_batch_samples", lambda *a, own=own: (lambda found: (found[0], found[1] * 2**22))(own(*a))
        )
        trainer.train()
    assert grads["scaled"].count_nonzero() > 0.95 * grads["scaled"].numel()
    assert grads["plain"].count_nonzero() < 0.5 * grads["plain"].numel()


def test_a_resumed_run_goes_on_with_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_FIRST", 2.0**40)
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = support.trainer(tmp_path, model=support.adapted(dtype=torch.float16), **settings)
    straight.train()
    resumed = support.trainer(tmp_path, model=support.adapted(dtype=torch.float16), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed._scale.record() == straight._scale.record()
    assert resumed._scale.factor < 2.0**40
    ours, theirs = support.trainable(resumed.model), support.trainable(straight.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_infinite_at_any_scale_stops_the_run(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, model=support.adapted(dtype=torch.float16), max_steps=2)
    weight = next(p for name, p in trainer.model.named_parameters() if "down_proj.lora_B" in name)
    weight.data.fill_(60000)
    with pytest.raises(TrainingError, match=r"float16 ends at 65,504, and dtype=.float32. does not\. Look"):
        trainer.train()


def test_what_float16_does_not_train(tmp_path: Path) -> None:
    model = support.adapted(dtype=torch.float16)
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    with pytest.raises(ModelError, match=r"lora_A.default.weight trains and is float16"):
        support.trainer(tmp_path, model=model).train()

    class Own(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    own = support.trainer(tmp_path, model=support.adapted(dtype=torch.float16))
    own.__class__ = Own
    with pytest.raises(NotSupportedYetError, match="a compute_loss of your own on a float16 model"):
        own.train()


def test_fp16_only_repeats_what_the_weights_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    support.trainer(tmp_path, model=support.adapted(dtype=torch.float16), fp16=True)
    assert not caplog.messages
    # What scripts say where bfloat16 is not supported.
    support.trainer(tmp_path, fp16=True)
    assert "fp16=True: on a CPU without bfloat16 this trains in float32" in caplog.text
    with pytest.raises(SettingsError, match="fp16=True, but the model's weights are bfloat16"):
        support.trainer(tmp_path, model=support.adapted(dtype=torch.bfloat16), fp16=True)
    with pytest.raises(SettingsError, match="bf16=True, but the model's weights are float16"):
        support.trainer(tmp_path, model=support.adapted(dtype=torch.float16), bf16=True)


def test_weights_that_train_themselves_are_not_float16_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dtype_to_train(None) == "float32"
    assert dtype_to_train("float16") == "float16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert dtype_to_train(None) is None
