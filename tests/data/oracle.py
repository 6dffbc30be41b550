"""Which tokens ought to be trained, found without anything of ``tunesmith.data``.

Answers are found by one regular expression a family, written by hand from its format. Tokens are laid along the text
by their own spelling, byte by byte, with no offsets from the tokenizer; laying them out checks itself, because every
token must spell the bytes that stand at its place.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

from .chat_families import FAMILIES

# Group 1 is the answer with its end of turn.
_CHATML = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
_LLAMA = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)"
_GEMMA = r"<start_of_turn>model\n(.*?<end_of_turn>)"
_MISTRAL = r"(?:\[/INST\]|\[/TOOL_RESULTS\])(?!\[TOOL_RESULTS\]|\[INST\])(.*?</s>)"
ANSWERS = {
    "chatml": _CHATML,
    "llama-3": _LLAMA,
    "llama-3-original": _LLAMA,
    "gemma": _GEMMA,
    "gemma-original": _GEMMA,
    "mistral": _MISTRAL,
    "mistral-pieces": _MISTRAL,
    "mistral-plain-markers": _MISTRAL,
    "qwen3": _CHATML,
    "gpt-oss": r"<\|start\|>assistant(.*?(?:<\|return\|>|<\|call\|>|<\|end\|>))",
    "phi-3": r"<\|assistant\|>\n(.*?<\|end\|>)",
    "deepseek-r1": r"<｜Assistant｜>(.*?<｜end▁of▁sentence｜>)",
}


def expected_documents(tokenizer, name: str, messages: list[dict], tools: list[dict] | None = None) -> list[tuple]:
    """Return (ids, trained, ends of turn) of each document that a conversation ought to become."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(_is_rewritten_later(name, messages, index) for index in answers):
        return [_expected(tokenizer, name, _render(tokenizer, messages, tools), slice(None))]
    return [
        _expected(tokenizer, name, _render(tokenizer, messages[: index + 1], tools), slice(-1, None))
        for index in answers
    ]


def _is_rewritten_later(name: str, messages: list[dict], index: int) -> bool:
    """Say whether the template writes this answer differently once something follows it.

    qwen3 writes a think block into the last answer only; gpt-oss closes the last answer with <|return|>, but tool calls
    with <|call|> in every place.
    """
    if index == len(messages) - 1:
        return False
    return name == "qwen3" or (name == "gpt-oss" and not messages[index].get("tool_calls"))


def byte_ranges(tokenizer, name: str, ids: list[int], text: str) -> list[tuple[int, int]]:
    """Return the bytes of ``text`` that each token spells."""
    family, data = FAMILIES[name], text.encode()
    ranges: list[tuple[int, int]] = []
    position = 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        start = position
        if token in family.special or token in family.plain:
            position += _spelled(data, position, token.encode())
            ranges.append((start, position))
            if family.swallows:
                position += len(data[position:]) - len(data[position:].lstrip())
            continue
        spelling = _bytes_of(token) if family.kind == "bytes" else _bytes_of_piece(token)
        if family.kind == "pieces" and spelling.startswith(b" ") and not data.startswith(spelling, position):
            spelling = spelling[1:]  # the "▁" put before a piece of text, which stands for nothing
        position += _spelled(data, position, spelling)
        ranges.append((start, position))
    assert position == len(data), "the tokens do not spell the whole text"
    return ranges


def _expected(tokenizer, name: str, text: str, which: slice) -> tuple:
    if FAMILIES[name].normalizes:
        text = unicodedata.normalize("NFC", text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ranges = byte_ranges(tokenizer, name, ids, text)
    trained = np.zeros(len(ids), dtype=bool)
    ends = []
    for match in list(re.finditer(ANSWERS[name], text, re.DOTALL))[which]:
        start, end = (len(text[:edge].encode()) for edge in match.span(1))
        inside = [(a < end and b > start) or (a == b and start <= a < end) for a, b in ranges]
        trained |= np.array(inside)
        ends.append(max(np.flatnonzero(inside)))
    return ids, trained, tuple(ends)


def _render(tokenizer, messages: list[dict], tools: list[dict] | None) -> str:
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)


def _spelled(data: bytes, position: int, spelling: bytes) -> int:
    assert data.startswith(spelling, position), f"{spelling!r} is not what stands at {data[position : position + 20]!r}"
    return len(spelling)


def _bytes_of_piece(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones are themselves, the others come from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + place): v for place, v in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    return bytes(_ALPHABET[character] for character in token)
