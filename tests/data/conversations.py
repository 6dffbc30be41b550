"""Seeded random conversations with everything that has broken masks somewhere: see ``random_conversation``."""

from __future__ import annotations

import json
import random

_TEXT = (
    "the a model train answer of to and question token is data prompt mask turn we you please write code run test "
    "assistant user system Assistant: User: end start number one two three hello world error fine maybe why"
)
WORDS = _TEXT.split()
# Composed (NFC) text only: a tokenizer may normalize, and the oracle then reads the normalized text.
UNICODE = ["é", "naïve", "Straße", "日本語", "한국어", "привет", "ไทย", "שלום", "∑∫", "½", "\u00a0", "\u200b", "ﬁ", "…"]
EMOJI = ["👋", "👋🏽", "👩‍👩‍👧", "🇫🇷", "🤖🤖", "❤️"]
CODE = [
    "def f(x):\n    return x\n",
    "```python\nprint('hi')\n```",
    "if a < b && c > d { e(); }",
    '{"a": [1, 2]}',
    "\tx\n\t\ty",
]
SPACE = ["\n", "\n\n", " ", "  ", "\n ", "\t"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Return the {name}.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "Where."}}},
        },
    }
    for name in ("weather", "time")
]


def random_text(rng: random.Random) -> str:
    """Words, code, scripts, emoji, with white space before, between and after; at times a single character."""
    if rng.random() < 0.1:
        return rng.choice(["a", ".", "7", "é", "👋", "0"])
    parts: list[str] = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.random()
        if kind < 0.7:
            parts.append(" ".join(rng.choices(WORDS, k=rng.randint(1, 5))))
        else:
            parts.append(rng.choice(rng.choice([UNICODE, EMOJI, CODE, SPACE])))
        parts.append(rng.choice(["", " ", " ", "\n"]))
    text = "".join(parts).strip() or "ok"
    before = rng.choice(SPACE) if rng.random() < 0.15 else ""
    after = rng.choice(SPACE) if rng.random() < 0.15 else ""
    return before + text + after


def random_conversation(seed: int, *, system: bool = True, tools: bool = False) -> list[dict]:
    """One to four exchanges, a system message in half of them, repeated contents, at times an unanswered question.

    With ``tools`` some answers first call a tool and read its result.
    """
    rng = random.Random(seed)
    messages: list[dict] = []
    if system and rng.random() < 0.5:
        messages.append({"role": "system", "content": random_text(rng)})
    said = [random_text(rng)]
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": _maybe_repeated(rng, said)})
        if tools and rng.random() < 0.5:
            messages.extend(_tool_exchange(rng))
        messages.append({"role": "assistant", "content": _maybe_repeated(rng, said)})
    if rng.random() < 0.1:
        messages.append({"role": "user", "content": random_text(rng)})
    return messages


def training_text() -> list[str]:
    """What the tests' tokenizers learn their merges from."""
    rng = random.Random(0)
    return [random_text(rng) for _ in range(400)]


def _maybe_repeated(rng: random.Random, said: list[str]) -> str:
    """Question and answer are often the same text: a search for an answer's text would find the wrong one."""
    if rng.random() < 0.3:
        return rng.choice(said)
    said.append(random_text(rng))
    return said[-1]


def _tool_exchange(rng: random.Random) -> list[dict]:
    name, place = rng.choice(["weather", "time"]), " ".join(rng.choices(WORDS, k=2))
    call = {"type": "function", "id": "abcdefghi", "function": {"name": name, "arguments": {"place": place}}}
    result = json.dumps({"result": random_text(rng)}, ensure_ascii=False)
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result, "tool_call_id": "abcdefghi"},
    ]
