"""What a runtime makes of a GGUF file, beside what the live model says: answers, tokens, prompts, stops.

llama.cpp where it is installed. Where it is not, transformers reads the tensors and answers with the config of the live
model; values, tokenizer and template are then compared by ``check.py`` alone.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from tunesmith.core.errors import ExportError
from tunesmith.export.gguf.runtime import Answers, ask_llama, has_llama
from tunesmith.export.gguf.source import Source
from tunesmith.export.gguf.vocab import Vocabulary
from tunesmith.export.verify import PROBES, Comparison, compare, compared

__all__ = ["TEXTS", "Trial", "refuse", "try_file"]

TEXTS = (
    *PROBES,
    "",
    " ",
    "\n\n\n  \t x",
    "3.14159 + 271828 = 0x1F, 2026-01-31",
    "naïve façade — “quoted” … ½ №7",
    "日本語の文章です。中文字符测试，한국어도.",
    "Привет, мир! Καλημέρα κόσμε. שלום עולם مرحبا",
    "🙂👩‍👩‍👧 🇫🇷 e\u0301 ﬁ",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }  // don't",
    "I'll we're SHE'S   they'VE",
)
"""Texts whose tokens are compared, beside prompts."""

_CHATS = (
    [{"role": "user", "content": "Where is my order?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}],
)
# Of which transformers reads the tensors. Of the values it reads some, so it is given the config of the live model.
_READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")


@dataclass(frozen=True, slots=True)
class Trial:
    """What a runtime made of a file.

    Attributes:
        comparison: with the live model; None where no runtime here can load it.
        reason: why none can.
        texts, chats: how many texts were cut and conversations rendered as the tokenizer does it.
        unknown_stops: tokens that end an answer, and that the runtime does not know to do so.
    """

    comparison: Comparison | None
    reason: str = ""
    texts: int = 0
    chats: int = 0
    unknown_stops: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        found = None if self.comparison is None else self.comparison.record()
        return {"comparison": found, "not_run": self.reason or None, "texts_cut_alike": self.texts,
                "chats_rendered_alike": self.chats,
                "stops_the_runtime_does_not_know": list(self.unknown_stops)}  # fmt: skip


def try_file(file: Path, source: Source, *, bar: float) -> Trial:
    """Load ``file`` in a process of its own and compare what it answers with the live model.

    Raises:
        ExportError: it cannot be loaded, or differs.
    """
    trial = _in_llama(file, source) if has_llama() else _in_transformers(file, source)
    if trial.comparison is not None:
        refuse(file, trial.comparison, bar + source.reference.rounding)
    return trial


def refuse(file: Path, found: Comparison, bar: float) -> None:
    """Raise where what a runtime answers is further from the live model than ``bar``."""
    if not found.kl <= bar:
        raise ExportError(
            f"{file.name} answers in {found.runtime} otherwise than the model: KL divergence {found.kl:.2g} on "
            f"{found.tokens} tokens (allowed {bar:g}), the same likeliest token in {found.top1:.1%} of them"
        )


def _in_transformers(file: Path, source: Source) -> Trial:
    arch = source.arch
    if arch not in _READ_BY_TRANSFORMERS:
        return Trial(None, f"llama-cpp-python is not installed, and transformers reads no {arch} from GGUF")
    said = {name: value for name, value in source.model.config.to_dict().items() if name != "quantization_config"}
    if arch == "llama":  # mistral too, within its window: transformers knows no other name for it
        said["model_type"] = arch
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as place:
        (Path(place) / "config.json").write_text(json.dumps(said), encoding="utf-8")
        (Path(place) / "model.gguf").symlink_to(file.absolute())
        return Trial(compare(source.reference, Path(place), runtime="transformers (GGUF)", dtype="float32"))


def _in_llama(file: Path, source: Source) -> Trial:
    tokenizer, vocabulary, reference = source.tokenizer, source.vocabulary, source.reference
    plain = [unicodedata.normalize("NFC", text) if vocabulary.composes else text for text in TEXTS]
    plain = [text for text in plain if not (vocabulary.doubles_spaces and text.startswith(" "))]
    special = tokenizer.bos_token or tokenizer.eos_token or ""
    chats = [(chat, text) for chat in _CHATS if (text := _rendered(tokenizer, chat)) is not None]
    texts = [*(plain if vocabulary.cuts_starts else []),
             *([f"{special}{text}" for text in plain] if vocabulary.cuts_behind else []),
             *(text for _, text in chats)]  # fmt: skip
    found = ask_llama(file, reference, texts=texts, chats=[chat for chat, _ in chats])
    _same_text(file, tokenizer, vocabulary, found, texts, [text for _, text in chats])
    unknown = [index for index in vocabulary.stops if index not in found.stops]
    return Trial(
        compared(reference, found.answers, "llama.cpp"),
        texts=len(texts),
        chats=len(chats),
        unknown_stops=tuple(tokenizer.convert_ids_to_tokens(unknown)),
    )


def _rendered(tokenizer: Any, chat: list[dict[str, str]]) -> str | None:
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return None
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return None  # no system message, say: llama.cpp would refuse it as well


def _same_text(
    file: Path, tokenizer: Any, vocabulary: Vocabulary, found: Answers, texts: list[str], prompts: list[str]
) -> None:
    """Raise where llama.cpp cuts a text or renders a conversation otherwise than the tokenizer."""
    for text, tokens in zip(texts, found.tokens, strict=True):
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        if list(own) != tokens:
            raise ExportError(f"llama.cpp cuts {text!r} in {file.name} into {tokens}, and the tokenizer into {own}")
    for own, other in zip(prompts, found.chats, strict=True):
        if own != other:
            raise ExportError(f"the chat template in {file.name} makes {other!r}, and the tokenizer's {own!r}")
    if found.adds_bos != vocabulary.adds_bos:
        raise ExportError(f"llama.cpp reads from {file.name} that BOS is to be added: {found.adds_bos}")
