"""The plan of a run: made before the first step, written beside it, followed on resume; a probe leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.training import support

from tunesmith import SFTConfig
from tunesmith.core.errors import SettingsError, TrainingError
from tunesmith.engine.install import engine_of, install
from tunesmith.engine.policies import Policy
from tunesmith.training import memory, sft
from tunesmith.training.memory import probe_run, state_bytes, work_of

SETTINGS: dict[str, Any] = {"rows": 16, "save_steps": 1, "save_total_limit": None}


def fused(mode: bool | str = "unsloth") -> Any:
    from tunesmith.adapters.inject import set_checkpointing

    model = support.adapted()
    install(model)
    set_checkpointing(model, mode)
    return model


def test_a_run_that_was_probed_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("plain", "probed"):
        model = support.adapted(lora_dropout=0.2)
        install(model)
        trainer = support.trainer(tmp_path / name, model=model, neftune_noise_alpha=5.0, **SETTINGS)
        if name == "probed":
            with torch.random.fork_rng():  # a loader draws a seed
                most = max(batch["tokens"] for batch in trainer.get_train_dataloader())
            states = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
            modes = [module.training for module in trainer.model.modules()]
            found = probe_run(trainer)
            assert found.tokens_per_s > 0 and found.peak > 2**20
            assert found.tokens == most
            assert torch.equal(torch.random.get_rng_state(), states[0])
            assert np.random.get_state()[1].tolist() == states[1]
            assert modes == [module.training for module in trainer.model.modules()]
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
        trainer.train()
    for file in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
        place = Path("checkpoint-4") / file
        assert support.digest(tmp_path / "plain" / place) == support.digest(tmp_path / "probed" / place), file


def test_a_probe_does_not_take_gradients_that_are_there(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, **SETTINGS)
    trainable = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    trainable.grad = torch.ones_like(trainable)
    with pytest.raises(TrainingError, match=r"Call model.zero_grad\(\) before it"):
        probe_run(trainer)


def test_layers_and_parts_follow_the_plan(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, model=fused(), **SETTINGS)
    engine = engine_of(trainer.model)
    assert engine is not None
    assert tuple(engine.policies) == trainer.plan.policies and trainer.part_tokens == trainer.plan.part_tokens
    assert trainer.plan.mode == "unsloth" and trainer.plan.peak > 0
    kept = support.trainer(tmp_path / "full", model=fused(True), **SETTINGS)
    assert set(kept.plan.policies) == {Policy.FULL}


def test_a_resumed_run_follows_the_plan_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = support.trainer(tmp_path, model=fused("auto"), max_steps=2, **SETTINGS)
    first.train()
    written = json.loads((tmp_path / "checkpoint-2" / "run.json").read_text())["plan"]
    assert written["policies"] == [str(policy) for policy in first.plan.policies]
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()  # leave the first one as the newest whole one
    again = support.trainer(tmp_path, model=fused("auto"), max_steps=2, **SETTINGS)
    other = memory.plan_run(again)
    from dataclasses import replace

    again.follow(replace(other, policies=(Policy.FULL, Policy.SEL_MIN), part_tokens=64))
    engine = engine_of(again.model)
    assert engine is not None and engine.policies == [Policy.FULL, Policy.SEL_MIN]
    again.train(resume_from_checkpoint=True)
    assert tuple(engine.policies) == first.plan.policies and again.part_tokens == first.part_tokens


def test_a_run_for_which_there_is_no_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (memory, sft):
        monkeypatch.setattr(module, "memory_there_is", lambda device: 2**20)
    with pytest.raises(SettingsError, match=r"GiB at its peak and there are 0\.00 GiB\. no setting fits"):
        support.trainer(tmp_path, model=fused(), **SETTINGS)


def test_documents_are_counted_up_to_their_last_trained_token(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, eval_dataset=tiny.chat_rows(5, seed=3), num_train_epochs=2, **SETTINGS)
    work = work_of(trainer.train_dataset, trainer.eval_dataset, trainer.args, multiple=1)
    documents = trainer.train_data.documents
    assert len(work.batches) == 2 * 4 and sum(map(len, work.batches)) == 2 * 16
    rows = sum(int(document.trained[1:].sum()) for document in documents)
    assert sum(count for batch in work.batches for _, count in batch) == 2 * rows
    assert work.longest <= max(map(len, documents)) and len(work.evaluated) == 2
    largest = max(sum(part["input_ids"].shape[1] for part in [batch]) for batch in trainer.get_train_dataloader())
    assert work.whole >= largest


def test_a_run_is_planned_for_the_micro_batches_that_it_comes_to(tmp_path: Path) -> None:
    # Batches of 4 rows, two a step: of 16 rows a run of one step sees 8.
    trainer = support.trainer(tmp_path, max_steps=1, gradient_accumulation_steps=2, **SETTINGS)
    work = work_of(trainer.train_dataset, None, trainer.args, multiple=1)
    seen = [sum(batch["lengths"]) for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
    assert work.tokens <= sum(seen) and len(work.batches) == 2
    assert work.whole == -(-max(sum(length for length, _ in batch) for batch in work.batches) // 64) * 64


def test_with_max_steps_the_number_of_epochs_says_nothing(tmp_path: Path) -> None:
    for steps in (3, 5, 60):
        batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = support.trainer(tmp_path, max_steps=steps, num_train_epochs=1, **batch, **SETTINGS)
        work = work_of(trainer.train_dataset, trainer.eval_dataset, trainer.args, multiple=1)
        assert len(work.batches) == min(2 * steps, 3 * 8)


def test_states_of_optimizers_are_counted_as_they_are() -> None:
    """Bytes that an optimizer keeps for a weight of 256 x 400 after a step, scales of 8 bits not counted."""
    from transformers import Trainer

    for name in ("sgd", "adafactor", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "lion_32bit", "lion_8bit",
                 "adamw_torch", "adamw_8bit", "ademamix", "ademamix_8bit"):  # fmt: skip
        layer = torch.nn.Linear(256, 400, bias=False)
        kind, words = Trainer.get_optimizer_cls_and_kwargs(SFTConfig(output_dir="x", optim=name, use_cpu=True), layer)
        optimizer = kind(layer.parameters(), **words)
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        kept = sum(value.numel() * value.element_size() for value in states) / layer.weight.numel()
        assert kept <= 1.05 * state_bytes(name) and (state_bytes(name) - kept < 1), (name, kept)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * 2**30)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 2**30)
    assert memory.memory_there_is(torch.device("cpu")) == 9 * 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.memory_there_is(torch.device("cpu")) == 5 * 2**30


def test_evaluation_is_cut_into_parts_too(tmp_path: Path) -> None:
    trainer = support.trainer(
        tmp_path, eval_dataset=tiny.chat_rows(7, seed=5), per_device_eval_batch_size=7, **SETTINGS
    )
    whole = trainer.evaluate()["eval_loss"]
    trainer.part_tokens = 64
    sizes: list[int] = []
    own = trainer.head.loss

    def loss(batch: Any, divisor: Any) -> Any:
        sizes.append(batch["input_ids"].shape[1])
        return own(batch, divisor)

    trainer.head.loss = loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-6)
    assert len(sizes) > 1 and max(sizes) <= max(64, trainer.plan.tokens * 8)
