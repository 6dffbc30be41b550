"""Unsloth's FastLanguageModel with the SFTTrainer that it patches.

``unsloth``: its defaults in 16 or 32 bit (``use_gradient_checkpointing="unsloth"``, ``dtype=None``,
``load_in_4bit=False``); ``unsloth-4bit`` those with ``load_in_4bit=True``. ``unsloth-nockpt``: nothing recomputed;
TRL's own checkpointing, which is on by default, has to be switched off as well. On a CPU it pads rows whatever it is
told, so ``unsloth-single`` also takes one row at a time; ``unsloth-best`` is that with its opt-in compilation of layers
for a CPU.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from benchmarks.arms.common import (
    ONE_BY_ONE,
    Clock,
    Job,
    RefusedError,
    checkpointed_modules,
    precision,
    run,
    trainer_arguments,
)
from benchmarks.workload import RANK, TARGETS, load_adapter

# Variant -> use_gradient_checkpointing.
VARIANTS: dict[str, bool | str] = {"": "unsloth", "4bit": "unsloth", "nockpt": False, "single": False, "best": False}
_WINDOW = 1024


def train(job: Job, clock: Clock) -> dict[str, Any]:
    """Train one variant."""
    if job.variant not in VARIANTS:
        raise RefusedError(f"no such variant: {', '.join(filter(None, VARIANTS))}")
    if job.variant == "best":
        os.environ["UNSLOTH_CPU_COMPILE"] = "1"
    # First of all: it patches what is imported after it.
    from unsloth import FastLanguageModel  # isort: skip
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    checkpointing = VARIANTS[job.variant]
    own: dict[str, Any] = {} if checkpointing else {"gradient_checkpointing": False}
    if job.variant in ("single", "best"):
        own |= ONE_BY_ONE
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.data().model,
        max_seq_length=_WINDOW,
        dtype=None if job.dtype is None else getattr(torch, job.dtype),
        load_in_4bit=job.variant == "4bit",
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        target_modules=list(TARGETS),
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
    )
    load_adapter(model, job.workload)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(job.rows()),
            args=SFTConfig(
                **{**trainer_arguments(job, folder), **own}, max_length=_WINDOW, train_sampling_strategy="sequential"
            ),
            callbacks=[clock.callback()],
        )
        facts = precision(trainer.model, trainer.accelerator.mixed_precision)
        clock.measure_gemm(facts["dtype"])
        trainer.train()
    args = trainer.args
    return {
        **facts,
        "settings": {
            "optim": str(getattr(args.optim, "value", args.optim)),
            "gradient_checkpointing": checkpointing,
            "checkpointed_modules": checkpointed_modules(trainer.model),
            "padding_free": bool(getattr(args, "padding_free", False)),
        },
    }


if __name__ == "__main__":
    run(train)
