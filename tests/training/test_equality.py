"""However a step is cut into micro-batches, bins or documents, loss and gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.engine.test_head import assert_close
from tests.training import support
from transformers import TrainerCallback


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of every step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})


def train(folder: Path, **settings: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    recorder = GradientRecorder()
    plain = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "num_train_epochs": 1, "save_strategy": "no"}
    trainer = support.trainer(folder, callbacks=[recorder], **{**plain, **settings})
    trainer.train()
    return trainer, recorder.steps


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_steps(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            assert_close(mine[name], other[name], 1e-5, name)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (1, 8), (3, 3)])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_accumulation_changes_nothing(batch: int, accumulation: int, train_on: str, tmp_path: Path) -> None:
    """8 = 4 x 2 = 1 x 8, and 3 + 3 + 2: rows have very different numbers of trained tokens."""
    whole, expected = train(tmp_path / "whole", rows=8, per_device_train_batch_size=8, train_on=train_on)
    cut, found = train(
        tmp_path / "cut",
        rows=8,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_on=train_on,
    )
    assert len(expected) == 1
    assert_same_steps(found, expected)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    for name, weight in support.trainable(cut.model).items():
        assert_close(weight, support.trainable(whole.model)[name], 1e-5, name)


def test_the_last_step_of_an_epoch_counts_its_own_tokens(tmp_path: Path) -> None:
    """22 rows by 8: the last step has 6, in micro-batches of 4 and 2."""
    whole, expected = train(tmp_path / "a", rows=22, per_device_train_batch_size=8, num_train_epochs=2)
    cut, found = train(
        tmp_path / "b", rows=22, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2
    )
    assert len(expected) == 6
    assert_same_steps(found[:1], expected[:1])
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "lfm2"])
def test_packing_changes_neither_loss_nor_gradients(family: str, tmp_path: Path) -> None:
    """One step over all rows: in bins of a window each, or as they are."""
    separate, expected = train(tmp_path / "a", rows=12, per_device_train_batch_size=12, model=support.adapted(family))
    packed, found = train(
        tmp_path / "b",
        rows=12,
        per_device_train_batch_size=12,
        packing=True,
        max_length=200,
        model=support.adapted(family),
    )
    assert len(packed.train_dataset) < 12
    assert_same_steps(found, expected)
    assert losses(packed) == pytest.approx(losses(separate), rel=1e-5)


def own_mean(documents: list[Any]) -> float:
    """Transformers' own loss of documents, as a mean over all their trained tokens."""
    model = support.adapted()
    total = count = 0.0
    for document in documents:
        ids, trained = torch.from_numpy(document.input_ids).long(), torch.from_numpy(document.trained)
        own = model(input_ids=ids[None], labels=torch.where(trained, ids, -100)[None])
        total += own.loss.item() * int(trained[1:].sum())
        count += int(trained[1:].sum())
    return total / count


def test_the_logged_loss_is_the_mean_over_trained_tokens(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, rows=8, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    assert losses(trainer) == pytest.approx([own_mean(trainer.train_data.documents)], rel=1e-5)


def test_evaluation_is_the_mean_over_tokens_not_over_batches(tmp_path: Path) -> None:
    import math

    rows = tiny.chat_rows(7, seed=5)
    trainers = [
        support.trainer(tmp_path / str(size), rows=8, eval_dataset=rows, per_device_eval_batch_size=size)
        for size in (1, 3, 7)
    ]
    values = [trainer.evaluate() for trainer in trainers]
    assert values[0]["eval_loss"] == pytest.approx(own_mean(trainers[0].eval_data.documents), rel=1e-5)
    assert values[0]["eval_loss"] == pytest.approx(values[1]["eval_loss"], rel=1e-6)
    assert values[0]["eval_loss"] == pytest.approx(values[2]["eval_loss"], rel=1e-6)
    assert values[0]["eval_perplexity"] == pytest.approx(math.exp(values[0]["eval_loss"]))
    assert len({value["eval_tokens"] for value in values}) == 1


ROWS = [
    {"messages": [{"role": "user", "content": "Name the capital of Norway."},
                  {"role": "assistant", "content": "Oslo."}]},
    {"messages": [{"role": "system", "content": "Answer in one word."},
                  {"role": "user", "content": "What is 17 + 25?"}, {"role": "assistant", "content": "42"},
                  {"role": "user", "content": "And half of it?"}, {"role": "assistant", "content": "21"}]},
    {"messages": [{"role": "user", "content": "Write a line about autumn rain.\nUse plain words."},
                  {"role": "assistant", "content": "The rain drums on wet leaves, and the street shines like tin."}]},
]  # fmt: skip


def test_loss_of_smollm2_equals_transformers_own(smollm2: Callable[[], tuple[Any, Any]], tmp_path: Path) -> None:
    from tunesmith import FastLanguageModel, SFTConfig, SFTTrainer

    model, tokenizer = smollm2()
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "down_proj"])
    ours: dict[str, float] = {}
    trained: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for train_on in ("assistant", "all"):
        args = SFTConfig(output_dir=str(tmp_path), train_on=train_on, per_device_train_batch_size=3, use_cpu=True)
        trainer = SFTTrainer(model=model, args=args, train_dataset=ROWS, processing_class=tokenizer)
        assert not trainer.head.reasons
        batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
        with torch.no_grad():
            ours[train_on] = trainer.head.loss(batch, len(batch["rows"])).item()
        documents = trainer.train_data.documents
        trained[train_on] = {tuple(d.input_ids.tolist()): torch.from_numpy(d.trained) for d in documents}
    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    total, count = dict.fromkeys(ours, 0.0), dict.fromkeys(ours, 0)
    for row in ROWS:
        # Its own rendering, its own shift and its own loss; only the assistant's mask comes from our documents.
        ids = tokenizer.apply_chat_template(row["messages"], return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        for train_on, masks in trained.items():
            labels = torch.where(masks[tuple(ids[0].tolist())], ids, -100)
            labelled = int((labels[:, 1:] != -100).sum())
            loss = base.loss_function(logits=logits, labels=labels, vocab_size=base.config.vocab_size)
            total[train_on] += loss.item() * labelled
            count[train_on] += labelled
    for train_on, loss in ours.items():
        assert loss == pytest.approx(total[train_on] / count[train_on], rel=1e-5)
    assert count["all"] == sum(len(ids) - 1 for ids in trained["all"]) > count["assistant"]
