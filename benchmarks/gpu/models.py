"""Random models of real shapes, made on the device, and the token arrays that every arm trains on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = [
    "RANK", "SHAPES", "TARGETS", "Work", "adapted", "build", "documents", "flops_per_token", "seed_adapter",
    "to_float8", "to_nf4",
]  # fmt: skip

RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_IGNORED = -100

# name -> (class of the config, its arguments). Weights are normal with a deviation of 0.02, as transformers makes them.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "8b": (
        "LlamaConfig",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
         "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    ),
    "4b": (
        "Qwen3Config",
        {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
         "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    ),
    "135m": (
        "LlamaConfig",
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
         "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    ),
    "toy-llama": (
        "LlamaConfig",
        {"vocab_size": 331, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    ),
    "toy-qwen3": (
        "Qwen3Config",
        {"vocab_size": 331, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "tie_word_embeddings": True},
    ),
    "toy-small": (
        "LlamaConfig",
        {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
         "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 512},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What one optimizer step trains on.

    Attributes:
        kind: "dense", documents of exactly ``length`` tokens with every token trained; or "packed", documents of
            log-normal lengths (mean 350, sigma 0.9, at most 2,048) of which the first 40 % is not trained.
        length: of a dense document; of a packed step the tokens at most.
        documents: of a dense step.
    """

    kind: str
    length: int
    documents: int = 1
    mean: float = 350.0
    longest: int = 2048

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.kind} {self.documents} x {self.length}" if self.kind == "dense" else f"packed {self.length}"


def documents(work: Work, vocabulary: int, step: int) -> list[dict[str, np.ndarray]]:
    """Return the documents of one step: ``input_ids``, and ``labels`` that are not shifted."""
    generator = np.random.default_rng([step, work.length, vocabulary])
    rows: list[dict[str, np.ndarray]] = []
    for length in _lengths(work, generator):
        ids = generator.integers(0, vocabulary, length)
        labels = ids.copy()
        if work.kind == "packed":
            labels[: int(0.4 * length)] = _IGNORED
        labels[0] = _IGNORED  # Nothing stands before it that could predict it.
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def _lengths(work: Work, generator: np.random.Generator) -> list[int]:
    if work.kind == "dense":
        return [work.length] * work.documents
    sigma = 0.9
    found: list[int] = []
    while True:
        drawn = int(generator.lognormal(np.log(work.mean) - sigma**2 / 2, sigma))
        length = min(max(drawn, 8), work.longest)
        if sum(found) + length > work.length:
            return found or [work.length]
        found.append(length)


def build(shape: str, device: str, dtype: torch.dtype) -> Any:
    """Return a causal language model of ``shape`` with seeded weights."""
    import transformers

    kind, arguments = SHAPES[shape]
    config = getattr(transformers, kind)(**arguments, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    deviation = float(model.get_input_embeddings().weight[:64].detach().float().std())
    if not 0.015 < deviation < 0.025:
        raise RuntimeError(f"the weights have a deviation of {deviation}, not 0.02: the model was not initialized")
    return model


def to_float8(model: Any) -> None:
    """Store the linear layers of the decoder as ``load_in_fp8`` does."""
    # models/quantize.py would ask for pydantic, which a machine need not have for this check.
    from tunesmith.engine.float8 import store_in_float8

    for _, _, layer in _linears(model):
        store_in_float8(layer, by_block=False)


def to_nf4(model: Any, dtype: torch.dtype) -> None:
    """Store the linear layers of the decoder as transformers does with ``load_in_4bit`` and double quantization."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent, name, layer in _linears(model):
        quantized = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        quantized.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        quantized.support_avx512bf16_for_cpu = False  # there it would pack the weight at its first evaluation
        setattr(parent, name, quantized.to(layer.weight.device))  # which quantizes
    model.is_loaded_in_4bit = True  # PEFT asks


def _linears(model: Any) -> list[tuple[Any, str, Any]]:
    """Return parent, name and module of every linear layer of the decoder."""
    found = [(parent, *child) for parent in model.model.modules() for child in parent.named_children()]
    return [(parent, name, layer) for parent, name, layer in found if type(layer) is torch.nn.Linear]


def adapted(model: Any) -> Any:
    """Return ``model`` with LoRA on all linear layers, A and B in float32 as PEFT makes them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    return seed_adapter(get_peft_model(model, config))


@torch.no_grad()
def seed_adapter(model: Any) -> Any:
    """Set A to numbers that depend on the layer's name alone, and B to zero, in place: every arm starts there."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            layer = name[name.index("layers.") : name.index(".lora_A.")]
            generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
            bound = parameter.shape[1] ** -0.5
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)
        elif ".lora_B." in name:
            parameter.zero_()
    return model


def flops_per_token(shape: str, work: Work) -> float:
    """Return what forward and backward cost at least, per token, with nothing computed twice.

    Frozen layers: a product forward and one for the input's gradient; adapters three; the head two on trained rows;
    attention two products forward and five backward over half of each square.
    """
    config = SHAPES[shape][1]
    hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    size = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    linears = ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, ffn), (hidden, ffn), (ffn, hidden))
    frozen = sum(inner * outer for inner, outer in linears)
    adapter = RANK * sum(inner + outer for inner, outer in linears)
    rows = documents(work, config["vocab_size"], 0)
    lengths = [len(row["input_ids"]) for row in rows]
    trained = sum(int((row["labels"] != _IGNORED).sum()) for row in rows)
    tokens = sum(lengths)
    attention = 14 * q * sum(length * length / 2 for length in lengths) / tokens
    head = 4 * config["vocab_size"] * hidden * trained / tokens
    return layers * (4 * frozen + 6 * adapter + attention) + head
