"""Each task learns: small models from scratch on rows of a seeded generator, scored on rows that they never saw."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests import tiny_tasks

from tunesmith import FastLanguageModel, SFTConfig, TaskTrainer


def learn(folder: Path, task: str, *, rows: Any, held_out: Any, epochs: float, base: Any, **labels: Any) -> Any:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), task_type=task, full_finetuning=True, dtype="float32", use_gradient_checkpointing=False, **labels
    )
    args = SFTConfig(
        output_dir=str(folder / "run"),
        learning_rate=2e-3,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        gradient_accumulation_steps=1,
        logging_steps=50,
        eval_split=0,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = TaskTrainer(model, args, rows, processing_class=tokenizer)
    trainer.train()
    return trainer.evaluate(held_out)


def apart(task: str, count: int, held_out: int) -> tuple[list[Any], list[Any]]:
    """Return rows to train on, and others that are none of them."""
    drawn = tiny_tasks.ROWS[task](4 * (count + held_out), seed=1)
    rows = list({str(row): row for row in drawn}.values())
    assert len(rows) >= count + held_out
    return rows[:count], rows[count : count + held_out]


@pytest.mark.parametrize(("task", "epochs"), [("SEQ_CLS", 8), ("TOKEN_CLS", 4)])
def test_labels_are_learnt_well_beyond_the_larger_class(tmp_path: Path, task: str, epochs: float) -> None:
    rows, held_out = apart(task, 500, 100)
    base = tiny_tasks.save_base(tmp_path / "base")
    names = dict(enumerate(tiny_tasks.LABELS[task]))
    figures = learn(tmp_path, task, rows=rows, held_out=held_out, epochs=epochs, base=base, id2label=names)
    right = [label for row in held_out for label in ([row["label"]] if "label" in row else row["tags"])]
    majority = Counter(right).most_common(1)[0][1] / len(right)
    assert figures["eval_accuracy"] >= majority + 0.15


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("task", "family", "sizes"),
    [
        ("SEQ_2_SEQ_LM", "t5", {"d_model": 64, "d_kv": 16, "d_ff": 128}),
        ("SEQ_2_SEQ_LM", "bart", {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}),
        ("QUESTION_ANS", "bert", {"hidden_size": 64, "intermediate_size": 128}),
    ],
)
def test_texts_and_answers_are_learnt_from_scratch(tmp_path: Path, task: str, family: str, sizes: Any) -> None:
    rows, held_out = apart(task, 3000, 200)
    base = tiny_tasks.save_base(tmp_path / "base", family, **sizes)
    figures = learn(tmp_path, task, rows=rows, held_out=held_out, epochs=8, base=base)
    assert figures["eval_exact_match"] >= 0.8
