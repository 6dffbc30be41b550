"""Real rows, real model, minutes long: training has to help on rows that it never saw."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_training_on_sarcastic_headlines_helps_on_held_out_ones(smollm2):
    from benchmarks.sarcasm import measure

    figures = measure(train=1500, held_out=300)
    scores = figures["evaluation"]
    assert scores["model"]["count"] == 300
    assert scores["model"]["value"] >= max(scores["base"]["value"], figures["majority"]) + 0.15


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_four_bits_learn_as_sixteen_do(smollm2):
    from benchmarks.train import WORKLOAD, build_workload, run_arm

    build_workload(WORKLOAD)
    job = {"workload": WORKLOAD, "steps": 30, "warmup": 0, "loss": "answers", "device": "cpu", "dtype": "float32"}
    whole, four = (run_arm(arm, **job) for arm in ("ours", "ours-4bit"))
    # The same rows in the same order. Before training NF4 raises the loss of so small a model by 12 to 17 %; measured
    # after 30 steps: 7 %.
    means = [sum(record["losses"][-10:]) / 10 for record in (whole, four)]
    assert four["losses"][0] > whole["losses"][0]
    assert means[1] <= 1.1 * means[0]
    assert means[1] / means[0] < four["losses"][0] / whole["losses"][0]
    assert four["peak_bytes"] < whole["peak_bytes"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_four_bits_that_start_with_what_rounding_lost_end_where_the_whole_base_does(smollm2, tmp_path):
    from tunesmith import FastLanguageModel

    base, tokenizer = smollm2()
    start = FastLanguageModel.get_peft_model(base, r=64, lora_alpha=64, init_lora_weights="loftq")
    start.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    four, _ = FastLanguageModel.from_pretrained(str(tmp_path / "start"), load_in_4bit=True, dtype="float32")
    whole = FastLanguageModel.get_peft_model(smollm2()[0], r=64, lora_alpha=64)
    figures = [learn_job_titles(model, tokenizer, tmp_path / "run") for model in (whole, four)]
    for of_whole, of_four in zip(*figures, strict=True):
        assert of_four <= 1.03 * of_whole, figures


def learn_job_titles(model: Any, tokenizer: Any, folder: Path) -> tuple[float, float]:
    """Train for 30 steps; return the loss over the last ten, and on rows that it never saw."""
    from benchmarks.sarcasm import rows_of

    from tunesmith import SFTConfig, SFTTrainer

    rows = rows_of("soc_codes")
    random.Random(0).shuffle(rows)
    args = SFTConfig(
        output_dir=str(folder),
        learning_rate=1e-3,
        max_steps=30,
        warmup_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        logging_steps=1,
        eval_split=0,
        seed=0,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows[30:390], args=args)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(losses[-10:]) / 10, trainer.evaluate(rows[:30])["eval_loss"]
