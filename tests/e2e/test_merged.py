"""What an adapter gained on an NF4 base is still there after a merge: the real model, real rows, a dozen steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

_STEPS, _BATCH, _HELD_OUT, _LONGEST = 12, 6, 40, 128


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_adapter_trained_in_four_bits_keeps_its_gain_when_it_is_merged(smollm2: Any, tmp_path: Path) -> None:
    from benchmarks.arms.ours import _prepared
    from benchmarks.train import WORKLOAD, build_workload
    from benchmarks.workload import RANK, TARGETS, load, load_adapter
    from transformers import AutoModelForCausalLM

    from tunesmith import FastLanguageModel, SFTConfig, SFTTrainer

    build_workload(WORKLOAD)
    work = load(WORKLOAD)
    rows = [row for row in work.rows("answers", 3000) if len(row["input_ids"]) <= _LONGEST]
    train, held_out = rows[: _STEPS * _BATCH], rows[_STEPS * _BATCH :][:_HELD_OUT]
    model, tokenizer = FastLanguageModel.from_pretrained(
        work.model, max_seq_length=2 * _LONGEST, dtype="float32", load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=RANK, target_modules=list(TARGETS), lora_alpha=RANK)
    load_adapter(model, WORKLOAD)
    args = SFTConfig(output_dir=str(tmp_path / "run"), per_device_train_batch_size=_BATCH, max_steps=_STEPS,
                     learning_rate=1e-3, lr_scheduler_type="constant", eval_split=0, save_strategy="no",
                     report_to="none")  # fmt: skip
    SFTTrainer(model=model, args=args, train_dataset=_prepared(train), processing_class=tokenizer).train()
    live = loss_of(model, held_out)
    with model.disable_adapter():
        base = loss_of(model, held_out)
    report = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    merged = loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), held_out)
    # Measured: base 4.740, live 3.337, merged 3.338; into NF4 weights and rounded again it would be 4.725.
    print(f"held-out loss: base {base:.3f}, live {live:.3f}, merged {merged:.3f} ({report.route})")
    assert base - live > 0.5
    assert (base - merged) / (base - live) >= 0.95
    assert report.comparison.kept is not None and report.comparison.kept >= 0.95


@torch.no_grad()
def loss_of(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return the mean loss of an answer token."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        logits = model.eval()(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
        count += int((labels[1:] >= 0).sum())
    return total / count
