"""Predicted and measured peak memory of training runs, each in a process of its own.

    python -m benchmarks.memory [--device cuda] [--record] [--only TEXT]

A run loads a model, trains a few steps with a checkpoint, and reports two predictions beside the peak resident set of
its process (on a GPU: beside the most that torch allocated there): ``planned``, from shapes alone before anything is
loaded, and ``predicted``, the trainer's own with the model there. ``--record`` appends a JSON line a configuration to
``results/memory.jsonl``, with the ratio of prediction and measurement. Random models are made once under
``.cache/benchmarks/memory``.

The arm ``transformers`` is what ``use_gradient_checkpointing="unsloth"`` is compared with: transformers and PEFT alone,
gradient checkpointing on, the documents of the micro-batch padded to one length, AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import append_record

__all__ = ["CONFIGURATIONS", "SHAPES", "measure", "model_folder", "name_of"]

ROOT = Path(__file__).parent.parent
_FOLDER = ROOT / ".cache" / "benchmarks" / "memory"

# name -> (class of the config, its arguments, dtype of the file). 0.23 and 0.97 billion parameters.
SHAPES: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3-0.2b": (
        "Qwen3Config",
        {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16, "head_dim": 64,
         "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
        "float32",
    ),
    "llama-1b": (
        "LlamaConfig",
        {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 15,
         "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
        "float32",
    ),
    "tiny": (
        "LlamaConfig",
        {"vocab_size": 16000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "float32",
    ),
}  # fmt: skip

_SMOL = "smollm2-135m"
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"model": _SMOL, "mode": False, "batch": 2, "length": 512, "r": 16},
    {"model": _SMOL, "mode": True, "batch": 2, "length": 512, "r": 64},
    {"model": _SMOL, "mode": "selective", "batch": 4, "length": 256, "r": 16, "trained": 0.1},
    {"model": _SMOL, "mode": "offload", "batch": 2, "length": 512, "r": 8},
    {"model": _SMOL, "mode": "sel_mlp", "batch": 1, "length": 1024, "r": 16, "trained": 0.5},
    {"model": _SMOL, "mode": "unsloth", "batch": 8, "length": 180, "r": 16, "vary": True, "trained": 0.3},
    {"model": _SMOL, "mode": "auto", "batch": 4, "length": 200, "r": 32, "vary": True},
    {"model": _SMOL, "mode": True, "batch": 1, "length": 2048, "r": 16, "trained": 0.2},
    {"model": _SMOL, "mode": False, "batch": 1, "length": 128, "r": 8, "dtype": "bfloat16"},
    {"model": "qwen3-0.2b", "mode": False, "batch": 1, "length": 512, "r": 16},
    {"model": "qwen3-0.2b", "mode": "selective", "batch": 1, "length": 1024, "r": 8, "trained": 0.2},
    {"model": "qwen3-0.2b", "mode": "unsloth", "batch": 4, "length": 256, "r": 128},
    {"model": "qwen3-0.2b", "mode": True, "batch": 2, "length": 300, "r": 16, "vary": True},
    {"model": "llama-1b", "mode": True, "batch": 1, "length": 256, "r": 16},
    {"model": "llama-1b", "mode": False, "batch": 1, "length": 256, "r": 8, "trained": 0.5},
    {"model": _SMOL, "mode": "sel_mlp", "batch": 3, "length": 300, "r": 24},
    {"model": _SMOL, "mode": "unsloth", "batch": 6, "length": 250, "r": 48, "vary": True, "trained": 0.1},
    {"model": "qwen3-0.2b", "mode": "auto", "batch": 4, "length": 200, "r": 16, "vary": True},
    {"model": "llama-1b", "mode": "selective", "batch": 2, "length": 128, "r": 32},
    {"model": _SMOL, "mode": "unsloth", "batch": 8, "length": 180, "r": 16, "vary": True, "width": "4bit"},
    {"model": "qwen3-0.2b", "mode": "selective", "batch": 2, "length": 512, "r": 16, "width": "4bit"},
    {"model": "llama-1b", "mode": True, "batch": 1, "length": 512, "r": 16, "width": "4bit"},
    {"model": _SMOL, "mode": "unsloth", "batch": 4, "length": 200, "r": 0, "vary": True, "full": True},
    {"model": "qwen3-0.2b", "mode": True, "batch": 2, "length": 256, "r": 0, "full": True},
    {"model": _SMOL, "mode": "unsloth", "batch": 8, "length": 60, "r": 0, "vary": True, "full": True,
     "dtype": "bfloat16", "steps": 4},
    {"model": _SMOL, "mode": "unsloth", "batch": 4, "length": 30, "r": 0, "vary": True, "full": True,
     "dtype": "bfloat16", "width": "4bit", "steps": 4},
    {"model": _SMOL, "mode": "unsloth", "batch": 8, "length": 180, "r": 16, "vary": True, "trained": 0.1,
     "dtype": "bfloat16", "steps": 40},
    {"model": _SMOL, "mode": True, "batch": 8, "length": 180, "r": 16, "vary": True, "trained": 0.1,
     "dtype": "bfloat16", "steps": 40},
    {"model": "qwen3-0.2b", "mode": "unsloth", "batch": 8, "length": 200, "r": 16, "vary": True, "trained": 0.2,
     "dtype": "bfloat16", "steps": 40},
    {"model": _SMOL, "mode": False, "batch": 8, "length": 90, "r": 16, "vary": True, "trained": 0.35,
     "dtype": "bfloat16", "steps": 60},
)  # fmt: skip
"""Batch, length, policy, rank over three models. ``vary`` draws lengths around ``length``; ``mode`` is
``use_gradient_checkpointing``, or a policy that no mode has alone; ``steps`` are 2 where nothing is said. The last four
are as long as a run has to be before its memory stands still: new numbers of tokens leave new kernels and new holes."""


_LLAMA = {"model": "llama-1b", "dtype": "bfloat16", "steps": 3}
ON_A_GPU: tuple[dict[str, Any], ...] = (
    *({**_LLAMA, "mode": mode, "batch": 8, "length": 1024, "r": 16}
      for mode in (False, "selective", True, "offload", "unsloth")),
    {**_LLAMA, "mode": False, "batch": 16, "length": 400, "r": 64, "vary": True, "trained": 0.2},
    {**_LLAMA, "mode": "selective", "batch": 4, "length": 2048, "r": 16, "width": "4bit"},
    {**_LLAMA, "mode": "unsloth", "batch": 4, "length": 1024, "r": 16, "width": "8bit"},
    {**_LLAMA, "mode": "unsloth", "batch": 4, "length": 1024, "r": 16, "width": "fp8"},
    {**_LLAMA, "mode": True, "batch": 4, "length": 1024, "r": 0, "full": True},
    {"model": _SMOL, "mode": "unsloth", "batch": 8, "length": 180, "r": 16, "vary": True,
     "dtype": "bfloat16", "steps": 12},
    {"model": _SMOL, "mode": False, "batch": 8, "length": 180, "r": 16, "vary": True, "width": "4bit",
     "dtype": "bfloat16", "steps": 12},
    {"model": _SMOL, "mode": "unsloth", "batch": 8, "length": 180, "r": 0, "vary": True, "full": True,
     "dtype": "bfloat16"},
)  # fmt: skip


def name_of(spec: dict[str, Any]) -> str:
    """Return a configuration in one line."""
    extra = [
        f"{key} {spec[key]}" for key in ("trained", "dtype", "width", "full", "vary", "steps", "arm") if key in spec
    ]
    words = f"{spec['model']} {spec.get('mode')} batch {spec['batch']} x {spec['length']} r {spec['r']}"
    return ", ".join([words, *extra])


def model_folder(name: str) -> str:
    """Return the folder of a random model of ``SHAPES``, made when it is not there, or ``name`` itself."""
    if name not in SHAPES:
        return name
    folder = _FOLDER / name
    if not (folder / "tokenizer.json").is_file():
        _make_model(name, folder)
    return str(folder)


def measure(spec: dict[str, Any], *, timeout: float = 3000) -> dict[str, Any]:
    """Run a configuration in a process of its own and return what it reports."""
    spec = {**spec, "folder": model_folder(spec["model"])}
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(spec)],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False,
        # It is main memory that is measured, also where a GPU is there, unless the GPU is asked for.
        env={**os.environ, **({} if spec.get("on") == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})},
    )  # fmt: skip
    if ended.returncode:
        raise RuntimeError(f"{name_of(spec)} failed: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def _make_model(name: str, folder: Path) -> None:
    import torch
    import transformers
    from tests.tiny import tiny_tokenizer

    kind, arguments, dtype = SHAPES[name]
    own = {"max_position_embeddings": 8192, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**arguments, **own)
    transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _lengths(spec: dict[str, Any], generator: Any) -> list[int]:
    import numpy as np

    count = spec["batch"] * spec.get("steps", 2)
    if not spec.get("vary"):
        return [spec["length"]] * count
    return np.clip(generator.lognormal(np.log(spec["length"]), 0.6, count), 16, 2048).astype(int).tolist()


def _rows(spec: dict[str, Any], vocabulary: int) -> list[tuple[Any, Any]]:
    """Return token ids of seeded random documents, and which of them are trained."""
    import numpy as np

    generator = np.random.default_rng(0)
    rows: list[tuple[Any, Any]] = []
    for length in _lengths(spec, generator):
        trained = generator.random(length) < spec.get("trained", 1.0)
        trained[-1] = True
        rows.append((generator.integers(0, vocabulary, length).astype(np.int32), trained))
    return rows


def _train_ours(spec: dict[str, Any]) -> dict[str, Any]:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    from tunesmith import FastLanguageModel, SFTConfig, SFTTrainer
    from tunesmith.adapters.inject import inject_adapter, train_all_weights
    from tunesmith.adapters.settings import AdapterSettings
    from tunesmith.adapters.state import empty_source
    from tunesmith.core.memory import peak_bytes, resident_bytes
    from tunesmith.data.ledger import KeptRow, Ledger
    from tunesmith.data.prepare import DocumentDataset, PreparedData
    from tunesmith.data.types import Document
    from tunesmith.engine.policies import Policy
    from tunesmith.memory import plan_training, shape_of
    from tunesmith.memory.estimate import present_when_loaded
    from tunesmith.models.load import facts_of, stored_bytes
    from tunesmith.training.lanes import lanes_there
    from tunesmith.training.memory import memory_there_is, work_of
    from tunesmith.training.preview import converted_bytes

    mode: Any = Policy(spec["mode"]) if spec["mode"] == "sel_mlp" else spec["mode"]
    asked = "selective" if isinstance(mode, Policy) else mode
    dtype = spec.get("dtype", "float32")
    width, full, on_gpu = spec.get("width"), spec.get("full", False), spec.get("on") == "cuda"
    kind = "cuda" if on_gpu else "cpu"
    stored = None if full else width  # weights that all train are stored whole, and computed with in 4 bits
    empty, source = empty_source(spec["folder"], dtype=dtype, width=stored)
    ledger, kept = Ledger(), []
    for index, (ids, trained) in enumerate(_rows(spec, empty.config.vocab_size)):
        kept.append(KeptRow((Document(ids, trained, f"row {index}"),), f"row {index}"))
        ledger.rows_in += 1
        ledger.keep(kept[-1])
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, per_device_train_batch_size=spec["batch"], gradient_accumulation_steps=1,
            eval_split=0, disable_tqdm=True, use_cpu=not on_gpu, save_strategy=spec.get("save", "steps"),
        )  # fmt: skip
        # What `tunesmith plan` knows: the shapes of the model, the rows, and this process with its libraries.
        if full:
            train_all_weights(empty, asked, width=width)
        else:
            empty = inject_adapter(empty, AdapterSettings(r=spec["r"], use_gradient_checkpointing=asked))
        size = facts_of(empty).dtype.dtype.itemsize
        shape = shape_of(empty, kind=kind, load_bytes=converted_bytes(stored_bytes(source), size, kind, stored))
        multiple = 1 if shape.itemsize > 2 else 64
        before_loading = plan_training(
            shape,
            work_of(DocumentDataset([row.documents[0] for row in kept]), None, args, multiple=multiple),
            mode=mode,
            memory=memory_there_is(args.device),
            present=present_when_loaded(shape, resident_bytes()),
            lanes=lanes_there(empty, args),
        )
        del empty
        model, tokenizer = FastLanguageModel.from_pretrained(
            spec["folder"],
            dtype=dtype,
            **({f"load_in_{width}": True} if width else {}),
            full_finetuning=full,
            use_gradient_checkpointing=asked,
        )
        if not full:
            model = FastLanguageModel.get_peft_model(model, r=spec["r"], use_gradient_checkpointing=asked)
        facts_of(model).checkpointing = mode
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=PreparedData(kept, ledger),
            args=args,
        )
        before = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()
        trainer.train()
    plan = trainer.plan
    return {
        "planned": before_loading.peak,
        "predicted": plan.peak,
        "measured": torch.cuda.max_memory_allocated() if on_gpu else peak_bytes(),
        "before": before,
        "policies": plan.describe(),
        "part_tokens": plan.part_tokens,
        "parts": plan.parts,
    }


def _train_transformers(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from tunesmith.core.memory import peak_bytes
    from tunesmith.models.aliases import find_model
    from tunesmith.models.gguf_cache import converted_gguf

    source = find_model(spec["folder"])
    place = str(converted_gguf(Path(source.path))) if source.kind == "gguf" else source.path
    dtype = getattr(torch, spec.get("dtype", "float32"))
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=spec["r"], target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    rows = _rows(spec, model.config.vocab_size)
    for start in range(0, len(rows), spec["batch"]):
        chosen = rows[start : start + spec["batch"]]
        longest = max(len(ids) for ids, _ in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (own, trained) in enumerate(chosen):
            ids[row, : len(own)] = torch.from_numpy(own).long()
            labels[row, : len(own)] = torch.where(torch.from_numpy(trained), ids[row, : len(own)], -100)
            mask[row, : len(own)] = 1
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"measured": peak_bytes()}


def main() -> None:
    """Measure the configurations and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--record", action="store_true", help="append to results/memory.jsonl")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        spec = json.loads(arguments.child)
        found = _train_transformers(spec) if spec.get("arm") == "transformers" else _train_ours(spec)
        print(json.dumps(found))
        return
    failed = False
    print(f"{'configuration':<74}{'planned':>11}{'predicted':>11}{'measured':>11} ratios")
    for spec in ON_A_GPU if arguments.device == "cuda" else CONFIGURATIONS:
        if arguments.only not in name_of(spec):
            continue
        spec = {**spec, "on": "cuda"} if arguments.device == "cuda" else spec
        try:
            found = measure(spec)
        except RuntimeError as error:
            print(error, flush=True)
            failed = True
            continue
        ratio, early = (found[key] / found["measured"] for key in ("predicted", "planned"))
        if arguments.record:
            append_record("memory", {**spec, **found, "ratio": round(ratio, 4), "planned_ratio": round(early, 4)})
        sizes = "".join(f"{found[key] / 2**20:>7.0f} MiB" for key in ("planned", "predicted", "measured"))
        choice = f"{found['policies']}, {found['part_tokens']} tokens"
        print(f"{name_of(spec):<74}{sizes} {early:.3f} {ratio:.3f}  {choice}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
