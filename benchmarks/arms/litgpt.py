"""litgpt: the loop of its ``finetune_lora`` out of its own parts, on the rows that all arms read.

Rows go through one at a time, its default, so that nothing is padded; eight make a step. Two things differ from its
script, so that losses agree: each row counts by its trained tokens, and gradients are clipped as the Trainers do.
Its q, k and v adapters are one parameter, which starts as the three of the workload.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.arms.common import BATCH, LEARNING_RATE, Clock, Job, RefusedError, precision, run
from benchmarks.workload import RANK

_PRECISION = {"float32": "32-true", "bfloat16": "bf16-true"}
_HEAD_CHUNK = 128


def train(job: Job, clock: Clock) -> dict[str, Any]:
    """Train its defaults."""
    if job.variant:
        raise RefusedError("there are no variants")
    import lightning
    import torch
    from litgpt.lora import GPT, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy, get_default_supported_precision, instantiate_torch_optimizer

    mode = get_default_supported_precision(training=True) if job.dtype is None else _PRECISION[job.dtype]
    fabric = lightning.Fabric(devices=1, accelerator=job.device, precision=mode)
    folder = Path(job.data().model)
    config = _config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with fabric.init_module():
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    _load(model, config, folder, Path(job.workload) / "adapter.safetensors")
    optimizer = instantiate_torch_optimizer("AdamW", model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    facts = precision(model, "bf16" if mode == "bf16-mixed" else None)
    module = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(optimizer)
    rows = [{name: torch.tensor([values]) for name, values in row.items()} for row in job.rows()]
    module.max_seq_length = max(row["input_ids"].shape[1] for row in rows)
    clock.measure_gemm(facts["dtype"])
    module.train()
    for start in range(0, len(rows), BATCH):
        clock.begin()
        batch = [
            {name: values.to(fabric.device) for name, values in row.items()} for row in rows[start : start + BATCH]
        ]
        trained = sum(int((row["labels"] >= 0).sum()) for row in batch)
        total = 0.0
        for row in batch:
            logits = module(row["input_ids"], lm_head_chunk_size=_HEAD_CHUNK)
            logits[-1] = logits[-1][..., :-1, :]
            targets = row["labels"][..., 1:]
            loss = chunked_cross_entropy(logits, targets) * ((targets >= 0).sum() / trained)
            fabric.backward(loss)
            total += loss.item()
        fabric.clip_gradients(module, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(total)
        clock.end()
    return {**facts, "settings": {"optim": "AdamW", "micro_batch_size": 1, "precision": mode}}


def _config(hf: dict[str, Any]) -> Any:
    """Return litgpt's config of a Llama-like model."""
    from litgpt.lora import Config

    rope = hf.get("rope_parameters") or {}
    every = ("query", "key", "value", "projection", "mlp")
    return Config(
        block_size=hf["max_position_embeddings"],
        vocab_size=hf["vocab_size"],
        padded_vocab_size=hf["vocab_size"],
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_embd=hf["hidden_size"],
        n_query_groups=hf["num_key_value_heads"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=hf["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        intermediate_size=hf["intermediate_size"],
        rope_base=int(rope.get("rope_theta") or hf.get("rope_theta") or 10_000),
        lora_r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        **{f"lora_{name}": True for name in every},
    )


def _load(model: Any, config: Any, folder: Path, adapter: Path) -> None:
    """Copy weights and the seeded A into ``model``; B is zero already."""
    import torch
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    own: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= load_file(shard)
    copy_weights_hf_llama(config, {}, own, weights)
    if "lm_head.weight" not in own:  # Tied.
        own["lm_head.weight"] = own["transformer.wte.weight"]
    # Its layers hold the frozen weight as ``linear.weight``.
    names = model.state_dict()
    own = {name if name in names else name.replace(".weight", ".linear.weight"): value for name, value in own.items()}
    found = model.load_state_dict(own, strict=False)
    if found.unexpected_keys or any("lora_" not in name for name in found.missing_keys):
        raise ValueError(f"weights do not fit: {found.unexpected_keys[:3]} {found.missing_keys[:3]}")
    start = load_file(adapter)
    layer = "base_model.model.model.layers.{}.{}.lora_A.weight"
    with torch.no_grad():
        for index, block in enumerate(model.transformer.h):
            qkv = [start[layer.format(index, f"self_attn.{name}_proj")] for name in "qkv"]
            block.attn.qkv.lora_A.copy_(torch.cat(qkv))
            block.attn.proj.lora_A.copy_(start[layer.format(index, "self_attn.o_proj")])
            block.mlp.fc_1.lora_A.copy_(start[layer.format(index, "mlp.gate_proj")])
            block.mlp.fc_2.lora_A.copy_(start[layer.format(index, "mlp.up_proj")])
            block.mlp.proj.lora_A.copy_(start[layer.format(index, "mlp.down_proj")])


if __name__ == "__main__":
    run(train)
