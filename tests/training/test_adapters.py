"""Runs on models with several adapters, on bases that other adapters left, and with weights that nothing would save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.training import support
from transformers import TrainerCallback

from tunesmith.core.errors import ModelError, SettingsError

SECOND = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


class Snapshots(TrainerCallback):
    """The weights that train, after every step."""

    def __init__(self, model: Any) -> None:
        self.model, self.after = model, dict[int, dict[str, torch.Tensor]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = support.trainable(self.model)


@pytest.mark.parametrize("only", [False, True])
def test_the_best_step_is_that_of_the_adapter_that_trained(only: bool, tmp_path: Path) -> None:
    model = support.adapted()
    model.add_adapter("second", SECOND)
    model.set_adapter("second")
    if only:
        model.delete_adapter("default")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    seen = Snapshots(model)
    # Rows of letters that training never sees: the loss on them soon rises.
    other = [{"text": "zq xj kv " * 5}] * 4
    trainer = support.trainer(
        tmp_path, model=model, eval_dataset=other, eval_steps=2, save_steps=2, num_train_epochs=2, callbacks=[seen],
        learning_rate=5e-2,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_global_step
    assert best < trainer.state.global_step
    after = dict(model.named_parameters())
    assert all(".second." in name for name in seen.after[best])
    assert all(torch.equal(after[name], value) for name, value in seen.after[best].items())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_several_active_adapters_stay_active_when_a_run_goes_on(tmp_path: Path) -> None:
    def start() -> Any:
        torch.manual_seed(0)
        model = support.adapted()
        model.add_adapter("second", SECOND)
        model.base_model.set_adapter(["default", "second"])
        return model

    whole = support.trainer(tmp_path / "a", model=start(), save_steps=3)
    whole.train()
    again = support.trainer(tmp_path / "a", model=start(), save_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.model.base_model.active_adapters == ["default", "second"]
    expected = support.trainable(whole.model)
    assert {name.split(".")[-2] for name in expected} == {"default", "second"}
    assert all(torch.equal(value, expected[name]) for name, value in support.trainable(again.model).items())


def test_weights_that_no_adapter_saves_are_refused(tmp_path: Path) -> None:
    model = support.adapted()
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"embed_tokens.weight trains, and no file of the adapter would hold it"):
        support.trainer(tmp_path, model=model)
    for arguments in ({"modules_to_save": ["embed_tokens"]}, {"bias": "all"}):
        support.trainer(tmp_path, model=support.adapted("qwen2", **arguments))


def test_an_adapter_that_is_merged_is_refused(tmp_path: Path) -> None:
    model = support.adapted()
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"Call model.unmerge_adapter\(\) first"):
        support.trainer(tmp_path, model=model)
    model.unmerge_adapter()
    support.trainer(tmp_path, model=model)


def test_a_trainer_trains_a_second_time_with_a_rate_for_embeddings(tmp_path: Path) -> None:
    model = support.adapted(modules_to_save=["embed_tokens"])
    trainer = support.trainer(tmp_path, model=model, max_steps=1, embedding_learning_rate=1e-3)
    trainer.train()
    trainer.train()
    assert len(trainer.optimizer.param_groups) > 1 and trainer.state.global_step == 1


def test_an_optimizer_of_other_weights_is_refused(tmp_path: Path) -> None:
    model = support.adapted()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trainer = support.trainer(tmp_path, model=model, optimizers=(torch.optim.AdamW(frozen), None))
    with pytest.raises(SettingsError, match="weights that train are not in the optimizer"):
        trainer.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = (torch.optim.SGD(trained, lr=0.1), None)
    support.trainer(tmp_path, model=model, max_steps=1, optimizers=optimizers).train()
