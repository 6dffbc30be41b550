"""TRL's SFTTrainer with PEFT.

``trl``: TRL's own defaults: float32 weights under bfloat16 autocast, every layer recomputed, rows padded.
``trl-best``: the fastest measured so far that computes the same loss. ``trl-free``, ``trl-nockpt`` and ``trl-single``
(one row at a time) are others.
"""

from __future__ import annotations

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

# "best" keeps everything and joins the rows on one axis instead of padding them; "free" does so under TRL's
# checkpointing. Measured in float32 on 2 AVX2 cores, the same steps, per second of processor time: "best" 53 tokens,
# padded without checkpointing 29, TRL's defaults in float32 19 (2026-11-25, other work on the machine).
_JOINED = {"bf16": False, "padding_free": True, "max_length": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "best": {"gradient_checkpointing": False, **_JOINED},
    "free": _JOINED,
    "nockpt": {"bf16": False, "gradient_checkpointing": False},
    "single": {"bf16": False, "gradient_checkpointing": False, **ONE_BY_ONE},
}


def train(job: Job, clock: Clock) -> dict[str, Any]:
    """Train one variant."""
    if job.variant not in VARIANTS:
        raise RefusedError(f"no such variant: {', '.join(filter(None, VARIANTS))}")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    own = dict(VARIANTS[job.variant])
    if job.dtype is not None:
        own |= {"bf16": False, "model_init_kwargs": {"dtype": job.dtype}}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=job.data().model,
            args=SFTConfig(**{**trainer_arguments(job, folder), **own}, train_sampling_strategy="sequential"),
            train_dataset=Dataset.from_list(job.rows()),
            processing_class=AutoTokenizer.from_pretrained(job.data().model),
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
            callbacks=[clock.callback()],
        )
        load_adapter(trainer.model, job.workload)
        facts = precision(trainer.model, trainer.accelerator.mixed_precision)
        clock.measure_gemm(facts["dtype"])
        trainer.train()
    args = trainer.args
    return {
        **facts,
        "settings": {
            "optim": str(getattr(args.optim, "value", args.optim)),
            "checkpointed_modules": checkpointed_modules(trainer.model),
            "padding_free": bool(args.padding_free),
        },
    }


if __name__ == "__main__":
    run(train)
