"""The older log-probabilities name every token by itself, and say where in the text it begins."""

from __future__ import annotations

import json

import pytest
from tests.tiny import tiny_tokenizer

from tunesmith.serving.answers import Answer
from tunesmith.serving.choose import Choice
from tunesmith.serving.replies import CompletionReply, TokenNames

SMILE, PANDA = ([f"bytes:\\x{byte:02x}" for byte in character.encode()] for character in "🙂🐼")


@pytest.mark.parametrize("is_whole", [True, False])
def test_halves_of_characters_have_names_and_places_and_special_tokens_take_no_place(is_whole):
    tokenizer = tiny_tokenizer()
    text = "z🙂<|pad|>é🐼."
    tokens = tokenizer(text)["input_ids"]
    # In the place of each token stands another that is a half of a character too.
    other = tokenizer("🐼")["input_ids"][1]
    choices = [Choice(token, -1.0, ((other, -0.5),)) for token in tokens]
    reply = CompletionReply("base", TokenNames(tokenizer), 1)
    if is_whole:
        said = tokenizer.decode(tokens, skip_special_tokens=True)
        found = reply.whole([Answer(said, choices, "stop")], len(tokens))["choices"][0]["logprobs"]
    else:
        parts = [reply._logprobs(0, [choice]) for choice in choices]
        found = {key: [part[key][0] for part in parts] for key in parts[0]}
    accent = [f"bytes:\\x{byte:02x}" for byte in "é".encode()]
    assert found["tokens"] == ["z", *SMILE, "<|pad|>", *accent, *PANDA, "."]
    assert found["text_offset"] == [0, *[1] * 4, 2, *[2] * 2, *[3] * 4, 4]
    assert all(top[PANDA[1]] == (-1.0 if token == PANDA[1] else -0.5) and top[token] == -1.0
               for token, top in zip(found["tokens"], found["top_logprobs"], strict=True))  # fmt: skip
    json.dumps(found)
