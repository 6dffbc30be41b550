"""Unsloth on the same random model and documents, where it is installed.

The model is made and saved by another process: Unsloth has to be imported before transformers. ``unsloth``: its
default, ``use_gradient_checkpointing="unsloth"``; ``unsloth-max``: also ``checkpoint_skip_layers="max"``, its fastest
setting; ``-nf4``: with ``load_in_4bit``.
"""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.gpu.models import Work
from benchmarks.gpu.stage import Stage

__all__ = ["run", "save"]

_MAX = {"checkpoint_skip_layers": "max"}
_VARIANTS: dict[str, dict[str, Any]] = {"unsloth-max": _MAX, "unsloth": {}, "unsloth-max-nf4": _MAX, "unsloth-nf4": {}}


def run(stage: Stage, shape: str) -> None:
    """Record both variants, or that they are missing."""
    work = Work("dense", 16, 2) if stage.is_dry else Work("dense", 8192)
    if importlib.util.find_spec("unsloth") is None:
        for arm in _VARIANTS:
            stage.record(model=shape, work=work.name, arm=arm, missing="the package unsloth is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        code = f"from benchmarks.gpu.unsloth import save; save({shape!r}, {stage.device!r}, {folder!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
        # First of all: it patches what is imported after it.
        from unsloth import FastLanguageModel

        for arm, options in _VARIANTS.items():
            stage.record(
                model=shape, work=work.name, arm=arm,
                **_arm(stage, shape, work, folder, FastLanguageModel, options, arm.endswith("-nf4")),
            )  # fmt: skip


def save(shape: str, device: str, folder: str) -> None:
    """Write the model of ``shape`` and a tokenizer of a few words to ``folder``."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from benchmarks.gpu.models import build

    model = build(shape, device, torch.float32 if device == "cpu" else torch.bfloat16)
    model.config.eos_token_id, model.config.pad_token_id = 0, 1
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    model.save_pretrained(folder)
    words = WordLevel({"<eos>": 0, "<pad>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def _arm(
    stage: Stage, shape: str, work: Work, folder: str, library: Any, options: dict[str, Any], in_4bit: bool
) -> dict[str, Any]:
    import torch

    from benchmarks.gpu.arms import step_of_transformers, timed
    from benchmarks.gpu.models import RANK, TARGETS, documents, flops_per_token, seed_adapter

    dtype = torch.float32 if stage.is_dry else torch.bfloat16
    facts: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "options": options}
    model = None
    try:
        model, _ = library.from_pretrained(
            folder, max_seq_length=work.length, dtype=dtype, load_in_4bit=in_4bit,
            use_gradient_checkpointing="unsloth",
        )  # fmt: skip
        model = library.get_peft_model(
            model, r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), lora_dropout=0, bias="none",
            use_gradient_checkpointing="unsloth", **options,
        )  # fmt: skip
        model.train()
        seed_adapter(model)
        if stage.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        batches = (documents(work, model.config.vocab_size, index) for index in range(6))
        found = timed(model, step_of_transformers(model, stage.device, dtype), batches, warmup=2, device=stage.device)
    # Whatever another library meets, the record says it.
    except Exception as error:
        return {**facts, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        del model
        gc.collect()
        if stage.device == "cuda":
            torch.cuda.empty_cache()
    needed = flops_per_token(shape, work)
    return {**facts, **found, "flops_per_token": needed, "model_tflops": needed * found["tokens_per_s"] / 1e12}
