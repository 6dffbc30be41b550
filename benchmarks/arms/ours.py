"""tunesmith: ``FastLanguageModel`` and ``SFTTrainer``.

``ours``: the defaults. ``ours-<policy>``: the same with another choice of what the backward pass recomputes.
``ours-4bit``, ``ours-8bit``: the defaults on a quantized base.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from typing import Any

from benchmarks.arms.common import Clock, Job, RefusedError, precision, run, trainer_arguments
from benchmarks.workload import RANK, TARGETS, load_adapter

# Variant -> use_gradient_checkpointing. The one place to add a policy.
POLICIES: dict[str, bool | str] = {
    "": "unsloth",  # The default of both calls.
    "none": False,
    "sel_mlp": False,
    "sel_min": "selective",
    "full": True,
    "offload": "offload",
    "4bit": "unsloth",
    "8bit": "unsloth",
}
# Variants that no value of use_gradient_checkpointing stands for: set on the engine itself.
ENGINE_POLICIES = ("sel_mlp",)
_WINDOW = 1024


def train(job: Job, clock: Clock) -> dict[str, Any]:
    """Train one variant."""
    if job.variant not in POLICIES:
        raise RefusedError(f"no policy of that name can be asked for: {', '.join(filter(None, POLICIES))}")
    from tunesmith import FastLanguageModel, SFTConfig, SFTTrainer
    from tunesmith.core.errors import NotSupportedYetError
    from tunesmith.engine.install import engine_of
    from tunesmith.engine.policies import Policy
    from tunesmith.training.loader import DocumentBatches, DocumentLoader

    class InOrder(SFTTrainer):
        """The trainer without its shuffling: every library is to see the same rows in each step."""

        def get_train_dataloader(self) -> DocumentLoader:
            size = self.args.per_device_train_batch_size
            return DocumentLoader(self.train_dataset, DocumentBatches(len(self.train_dataset), size, shuffle=False))

    policy = POLICIES[job.variant]
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            job.data().model,
            max_seq_length=_WINDOW,
            dtype=job.dtype,
            load_in_4bit=job.variant == "4bit",
            load_in_8bit=job.variant == "8bit",
            use_gradient_checkpointing=policy,
        )
        model = FastLanguageModel.get_peft_model(
            model, r=RANK, target_modules=list(TARGETS), lora_alpha=RANK, use_gradient_checkpointing=policy
        )
    except NotSupportedYetError as error:
        raise RefusedError(str(error)) from error
    load_adapter(model, job.workload)
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=model,
            processing_class=tokenizer,
            train_dataset=_prepared(job.rows()),
            args=SFTConfig(**trainer_arguments(job, folder), eval_split=0),
            callbacks=[clock.callback()],
        )
        engine = engine_of(model)
        if job.variant in ENGINE_POLICIES:
            if engine is None:
                raise RefusedError("the engine is not installed on this model")
            engine.set_policy(Policy(job.variant))
        facts = precision(trainer.model)
        clock.measure_gemm(facts["dtype"])
        trainer.train()
    args = trainer.args
    return {
        **facts,
        "settings": {
            "optim": str(getattr(args.optim, "value", args.optim)),
            "use_gradient_checkpointing": policy,
            "policies": {} if engine is None else dict(Counter(map(str, engine.policies))),
            "plan": "" if engine is None else str(engine.plan),
            "notes": [*model.tunesmith_facts.notes, *trainer.head.reasons, *(engine.notes if engine else [])],
        },
    }


def _prepared(rows: list[dict[str, list[int]]]) -> Any:
    """Return rows that are tokenized already as the trainer's own kind of data."""
    import numpy as np

    from tunesmith.data.ledger import KeptRow, Ledger
    from tunesmith.data.prepare import PreparedData
    from tunesmith.data.types import Document

    ledger, kept = Ledger(rows_in=len(rows)), []
    for index, row in enumerate(rows):
        labels = np.array(row["labels"])
        place = f"row {index}"
        document = Document(np.array(row["input_ids"], dtype=np.int32), labels >= 0, place)
        kept.append(KeptRow((document,), place))
        ledger.keep(kept[-1])
    return PreparedData(kept, ledger)


if __name__ == "__main__":
    run(train)
