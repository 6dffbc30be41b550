"""Text is given out in whole characters, and nothing of a stop string."""

from __future__ import annotations

import pytest
from tests.tiny import spaced_tokenizer, tiny_tokenizer

from tunesmith.serving.text import TextStream

TEXTS = ["the cat sat", "naïve café 🙂 漢字 👩‍👩‍👧 end", "  two  spaces\n\nlines ", "<|im_start|>user"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_parts_make_the_whole_and_no_part_is_half_a_character(text):
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer)
    parts = [stream.add(token) for token in tokens]
    assert all("\ufffd" not in part for part in parts)
    assert "".join(parts) + stream.end() == tokenizer.decode(tokens, skip_special_tokens=True)


def test_an_answer_cut_inside_a_character_ends_as_the_tokenizer_decodes_it():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("ab 🙂")["input_ids"][:-1]
    stream = TextStream(tokenizer)
    parts = [stream.add(token) for token in tokens]
    assert "".join(parts) == "ab "
    assert "".join(parts) + stream.end() == tokenizer.decode(tokens)


def test_what_may_begin_a_stop_string_waits():
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, ["END OF", "zz"])
    given = [stream.add(token) for token in tokenizer("a EN zEND")["input_ids"]]
    assert "".join(given) == "a EN z"
    assert stream.end() == "END"
    stream = TextStream(tokenizer, ["END OF", "zz"])
    given = []
    for token in tokenizer("a EN zEND OF it")["input_ids"]:
        given.append(stream.add(token))
        if stream.is_stopped:
            break
    assert "".join(given) == "a EN z"
    assert stream.is_stopped
    assert stream.end() == ""


def test_a_text_that_goes_on_keeps_the_space_before_it():
    tokenizer = spaced_tokenizer()
    the, cat, smile = 1, 0, [2 + byte for byte in "🙂".encode()]
    for prompt, tokens, text in (
        ([], [cat, cat], "cat cat"),
        ([the], [cat, cat], " cat cat"),
        ([the] * 20 + smile, [*smile, cat], "🙂 cat"),
        ([the, *smile[:2]], [cat], "cat"),
    ):
        stream = TextStream(tokenizer, prompt=prompt)
        assert "".join(map(stream.add, tokens)) + stream.end() == text
