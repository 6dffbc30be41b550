"""What a process that is killed does: it trains, with everything that draws random numbers or keeps state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STEPS = 18
"""Of the tiny run."""


def tiny_run(folder: str) -> Any:
    """Return a trainer with everything that draws random numbers or keeps state: dropout, noise, evaluation, epochs."""
    from tests import tiny
    from tests.training import support

    return support.trainer(
        folder,
        rows=24,
        model=support.adapted("llama", lora_dropout=0.2, use_gradient_checkpointing=True),
        eval_dataset=tiny.chat_rows(6, seed=1),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        learning_rate=3e-3,
        neftune_noise_alpha=5,
        eval_steps=1,
        save_steps=1,
    )


def real_run(folder: str) -> Any:
    """Return a trainer of the real SmolLM2 on a few rows."""
    from tests import tiny

    from tunesmith import FastLanguageModel, SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained("smollm2-135m", dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=8, lora_dropout=0.1)
    args = SFTConfig(
        output_dir=folder,
        max_steps=30,
        save_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    return SFTTrainer(model=model, args=args, train_dataset=tiny.chat_rows(40), processing_class=tokenizer)


RUNS = {"tiny": tiny_run, "smollm2": real_run}


def train(folder: Path, model: str, resume: bool) -> None:
    """Train and leave the adapter in ``<folder>/adapter``."""
    import torch

    torch.set_num_threads(1)
    trainer = RUNS[model](str(folder))
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.model.save_pretrained(folder / "adapter")
