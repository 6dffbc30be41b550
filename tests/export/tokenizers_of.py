"""Tiny tokenizers as the families have them."""

from __future__ import annotations

import copy
from typing import Any

from tests import tiny

from tunesmith.data.templates import apply_template

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Says something where no system message is given."""
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATES = ("chatml", "llama-3", "gemma", "mistral", "smollm")
_MARKERS = {
    "llama-3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
}


def with_template(name: str) -> Any:
    """Return the tiny tokenizer with a chat template and the tokens that it needs."""
    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    if name in ("llama-3", "gemma", "mistral"):
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens(_MARKERS.get(name, []), special_tokens=True)
    if name == "smollm":
        tokenizer.chat_template = SMOLLM
    else:
        apply_template(tokenizer, name)
    return tokenizer


def composing() -> Any:
    """Return a tokenizer that composes characters and cuts text as Qwen's does."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    tokenizer = with_template("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def spaced(*, prepends: bool = True, scheme: str | None = None, lossy: bool = False) -> Any:
    """Return a tokenizer as SentencePiece makes them: spaces are U+2581, bytes have tokens, BOS comes first.

    ``scheme``: when a space comes before a text, as newer ones say it. ``lossy``: some merges are left out.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("▁the", "▁cat", "▁sat", "▁on", "▁red", "▁hill")
    pieces = dict.fromkeys(word[:length] for word in words for length in range(2, len(word) + 1))
    letters = dict.fromkeys("▁" + "abcdefghijklmnopqrstuvwxyz.,!?")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    if lossy:
        vocabulary["at"] = len(vocabulary)
        merges.append(("a", "t"))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    if scheme is not None:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepends else spaces
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
