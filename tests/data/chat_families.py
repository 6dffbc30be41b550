"""Small tokenizers, each with the special tokens and habits of a model family, and that family's chat template.

No model file is needed: the merges are learned from ``conversations.training_text``. The templates that we did not
write come from the ``trl`` package (Apache-2.0), which ships the original files; it is read, never imported.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.templates import get_template

from .conversations import training_text


@dataclass(frozen=True)
class Family:
    """How one family tokenizes.

    ``kind``: "bytes" (byte-level BPE) or "pieces" (SentencePiece-like: "▁" for a space and put before each piece of
    text, byte fallback). ``words``: how byte-level text is cut before merging, "gpt2" or "llama3" (which keeps blank
    lines whole). ``trims``: the post-processor trims white space off the offsets, as Llama 3's does.
    ``swallows``: special tokens take in the white space behind them, as Phi-3's do. ``plain``: added, but not special.
    """

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    kind: str = "bytes"
    words: str = "gpt2"
    adds_bos: bool = False
    trims: bool = False
    swallows: bool = False
    normalizes: bool = False
    plain: tuple[str, ...] = ()


_QWEN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_MISTRAL += ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_GPT_OSS = ("<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
_PHI = ("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")

_LLAMA3_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

FAMILIES = {
    # BOS opens every turn and pad = EOS = end of turn, as in SmolLM2
    "chatml": Family("chatml", ("<|im_start|>", "<|im_end|>"), "<|im_start|>", "<|im_end|>"),
    "llama-3": Family("llama-3", _LLAMA, "<|begin_of_text|>", "<|eot_id|>", words="llama3", adds_bos=True, trims=True),
    "gemma": Family("gemma", _GEMMA, "<bos>", "<eos>", adds_bos=True),
    "mistral": Family("mistral", _MISTRAL, "<s>", "</s>", adds_bos=True),
    "mistral-pieces": Family("mistral", _MISTRAL, "<s>", "</s>", kind="pieces", adds_bos=True),
    "mistral-plain-markers": Family("mistral", ("<s>", "</s>"), "<s>", "</s>", kind="pieces", adds_bos=True),
    "llama-3-original": Family("trl:llama3", _LLAMA, "<|begin_of_text|>", "<|eot_id|>", adds_bos=True, trims=True),
    "gemma-original": Family("trl:gemma", _GEMMA, "<bos>", "<eos>", kind="pieces", adds_bos=True),
    "qwen3": Family(
        "trl:qwen3", ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>", words="llama3", normalizes=True, plain=_QWEN
    ),
    "gpt-oss": Family("trl:gptoss", _GPT_OSS, "<|startoftext|>", "<|return|>", words="llama3"),
    "phi-3": Family("trl:phi3", _PHI, "<s>", "<|endoftext|>", kind="pieces", adds_bos=True, swallows=True),
    "deepseek-r1": Family(
        "trl:deepseek_r1_distill", _DEEPSEEK, _DEEPSEEK[0], _DEEPSEEK[1], adds_bos=True, trims=True, plain=_QWEN[:2]
    ),
}


def template_text(name: str) -> str:
    """Return one of our templates by name, or the file of the ``trl`` package for ``"trl:name"``."""
    if not name.startswith("trl:"):
        return get_template(name).jinja
    wanted = f"trl/chat_templates/{name.removeprefix('trl:')}.jinja"
    try:
        files = importlib.metadata.files("trl") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError("tests/data needs the templates in trl: pip install --no-deps trl==1.16.0") from error
    return next(entry for entry in files if str(entry) == wanted).read_text(encoding="utf-8")


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a fresh tokenizer of the family, its chat template set."""
    family = FAMILIES[name]
    backend = Tokenizer.from_str(_trained_backend(family.kind))
    backend.add_special_tokens([AddedToken(t, rstrip=family.swallows, normalized=False) for t in family.special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.plain])
    if family.words == "llama3":
        words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if family.normalizes:
        backend.normalizer = normalizers.NFC()
    steps = [processors.ByteLevel(trim_offsets=True)] if family.trims else []
    if family.adds_bos:
        start = (family.bos, backend.token_to_id(family.bos))
        steps.append(processors.TemplateProcessing(single=[family.bos, "$A"], special_tokens=[start]))
    if steps:
        backend.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, pad_token=family.eos
    )
    tokenizer.chat_template = template_text(family.template)
    return tokenizer


@cache
def _trained_backend(kind: str) -> str:
    """Return a trained tokenizer without special tokens as JSON; learning the merges takes a moment."""
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator(training_text(), trainer)
        return backend.to_str()
    backend = Tokenizer(models.BPE(byte_fallback=True))
    spaces = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split("\n", "isolated")])
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=byte_tokens, initial_alphabet=["▁"], limit_alphabet=90, show_progress=False
    )
    backend.train_from_iterator(training_text(), trainer)
    pieces = Tokenizer(backend.model)
    # As the converters write Llama 2's and Mistral's: no pre-tokenizer, "▁" before each piece of text.
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return pieces.to_str()
