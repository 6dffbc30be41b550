"""One way to make a small trainer, for the tests and for the processes that they kill."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests import tiny

# What no two runs have in common.
_TIMES = ("runtime", "_per_second", "tokens_per_s", "peak_bytes", "total_flos")


def adapted(family: str = "llama", *, dtype: Any = None, seed: int = 0, **adapter: Any) -> Any:
    """Return a tiny model with document attention and a LoRA adapter whose B is not zero."""
    import torch

    from tunesmith import FastLanguageModel
    from tunesmith.core.device import DtypeChoice
    from tunesmith.engine.attention import use_document_attention
    from tunesmith.models.load import ModelFacts

    model = tiny.tiny_model(family, seed=seed)
    model = model if dtype is None else model.to(dtype)
    use_document_attention(model)
    weights = model.get_input_embeddings().weight.dtype
    model.tunesmith_facts = ModelFacts(f"tiny-{family}", DtypeChoice(weights, "a test"), tiny.WINDOW)
    model = FastLanguageModel.get_peft_model(model, **{"r": 4, "use_gradient_checkpointing": False, **adapter})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trainer(folder: Path | str, *, rows: Any = 24, model: Any = None, **settings: Any) -> Any:
    """Return an ``SFTTrainer`` on a tiny model; ``settings`` are those of the trainer and of ``SFTConfig``.

    Checkpoints, a seventh of so short a run, are written only where ``settings`` say something about them.
    """
    from tunesmith import SFTConfig, SFTTrainer

    saved = "steps" if any(name.startswith(("save_", "eval_", "load_best")) for name in settings) else "no"

    of_trainer = (
        "eval_dataset", "callbacks", "formatting_func", "optimizers", "data_collator", "dataset_num_proc",
        "peft_config", "compute_metrics", "mapping",
    )  # fmt: skip
    own = {name: settings.pop(name) for name in of_trainer if name in settings}
    args = SFTConfig(
        output_dir=str(folder),
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
           "disable_tqdm": True, "use_cpu": True, "eval_split": 0, "save_strategy": saved, **settings},
    )  # fmt: skip
    return SFTTrainer(
        model=adapted() if model is None else model,
        args=args,
        train_dataset=tiny.chat_rows(rows) if isinstance(rows, int) else rows,
        processing_class=tiny.tiny_tokenizer(),
        **own,
    )


def trainable(model: Any) -> dict[str, Any]:
    """Return copies of the trainable weights by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not any(time in key for time in _TIMES)} for line in lines]
