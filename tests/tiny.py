"""Tiny random models of many families, a small real tokenizer and rows to train on: everything real but the knowledge.

Two layers, hidden 32, fewer key heads than query heads, an odd vocabulary, windows of a few tokens: small enough for
seconds, odd enough that a wrong stride, a repeated head or an ignored window shows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt-oss",
    "mixtral",
    "qwen3-moe",
)
"""Families whose documents can be joined on one token axis."""

OWN_ATTENTION = ("falcon", "bloom")
"""Families whose attention goes by masks of its own alone: their documents run one at a time."""

HYBRIDS = ("lfm2", "mamba")
"""Families with a recurrence or a convolution over tokens: joined documents would leak into each other."""

VOCABULARY = 331
WINDOW = 512

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.3,  # large, so that every layer moves the logits
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MIXED_LAYERS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

# family -> (config class, what differs from the common arguments)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0,
                                "final_logit_softcapping": 3.0, **_MIXED_LAYERS}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, **_MIXED_LAYERS}),
    "phi3": ("Phi3Config", {}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                                **_EXPERTS, **_MIXED_LAYERS}),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "qwen3-moe": ("Qwen3MoeConfig", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 24}),
    "qwen2-moe": ("Qwen2MoeConfig", {"use_sliding_window": True, "num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
                                     **_MIXED_LAYERS}),
    "phimoe": ("PhimoeConfig", {"sliding_window": 64, **_EXPERTS}),
    "falcon": ("FalconConfig", {"hidden_dropout": 0.0}),
    "bloom": ("BloomConfig", {"hidden_dropout": 0.0}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "mamba": ("MambaConfig", {"state_size": 4, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}),
}  # fmt: skip


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """Return a seeded float32 causal language model of ``family`` in training mode."""
    import torch
    import transformers

    name, own = _CONFIGS[family]
    config = getattr(transformers, name)(**{**_COMMON, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # Fresh norms are all ones and biases zero: neither would show a mistake.
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "A_log" not in parameter_name and "dt_proj" not in parameter_name:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def save_model(folder: Any, family: str = "llama") -> None:
    """Write a tiny model and the tokenizer to ``folder``."""
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


_LETTERS = "the cat sat on a mat and saw the dog run to the red house while rain fell over every green hill " * 20


@cache
def tiny_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer of 317 tokens with the ChatML template: one instance for all, not to change."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tunesmith.data.templates import apply_template

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=317,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_LETTERS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    apply_template(tokenizer, "chatml")
    return tokenizer


@cache
def spaced_tokenizer() -> Any:
    """Return a tokenizer whose words bring their space, dropped at the beginning of a text, as SentencePiece writes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["\u2581cat", "\u2581the", *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", "</s>", "\u2581"]
    merges = [("\u2581", "cat"), ("\u2581", "the")]
    vocabulary = {word: index for index, word in enumerate([*words, "cat", "the"])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def chat_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return seeded conversations of one or two exchanges and very different lengths."""
    import random

    draw = random.Random(seed)
    words = _LETTERS.split()[:22]

    def sentence(longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, longest)))

    rows: list[dict[str, Any]] = []
    for _ in range(count):
        messages = [{"role": "system", "content": sentence(4)}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 2)):
            messages.append({"role": "user", "content": sentence(8)})
            messages.append({"role": "assistant", "content": sentence(12)})
        rows.append({"messages": messages})
    return rows
