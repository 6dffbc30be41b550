"""Character spans of tokens: whole, in order, and right where tokenizers report them wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.data.tokens import SpanTokenizer, TokenSpans, special_token_pattern

from .chat_families import FAMILIES
from .conversations import random_text


@pytest.mark.parametrize("family", ["chatml", "llama-3", "llama-3-original", "gpt-oss", "deepseek-r1"])
def test_byte_level_spans_leave_no_character_out(chat_tokenizer, family, rng):
    """Also where the tokenizer itself reports spans without their spaces (llama-3, deepseek-r1)."""
    tokens = SpanTokenizer(chat_tokenizer(family))
    for _ in range(50):
        text = random_text(rng) + "  " + random_text(rng)
        spans = tokens.tokenize(text)
        covered = {at for a, b in zip(spans.starts, spans.ends, strict=True) for at in range(a, b)}
        assert covered == set(range(len(text)))
        assert (np.diff(spans.starts) >= 0).all() and (np.diff(spans.ends) >= 0).all()


def test_a_space_inside_a_token_is_seen_at_its_edge(chat_tokenizer):
    """The span of " the" holds its space, so a boundary between the two is known to cut it."""
    spans = SpanTokenizer(chat_tokenizer("llama-3")).tokenize("to the")
    assert spans.is_cut_at(len("to ")) and not spans.is_cut_at(len("to"))


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_tokenizers_own(chat_tokenizer, family, rng):
    tokenizer = chat_tokenizer(family)
    tokens = SpanTokenizer(tokenizer)
    for _ in range(20):
        text = random_text(rng) + FAMILIES[family].special[0] + random_text(rng)
        assert tokens.tokenize(text).ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        started = tokens.with_default_start(tokens.tokenize("Hello"))
        assert started.ids.tolist() == tokenizer("Hello")["input_ids"]


def test_padding_and_truncation_of_the_tokenizer_do_not_matter(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    text = "the model " * 20
    wanted = tokenizer(text)["input_ids"]
    tokenizer(text, truncation=True, max_length=5)
    assert len(tokenizer.backend_tokenizer.encode(text).ids) == 5
    assert SpanTokenizer(tokenizer).tokenize(text).ids.tolist() == wanted


def test_a_special_token_does_not_own_the_white_space_it_swallows(chat_tokenizer):
    spans = SpanTokenizer(chat_tokenizer("phi-3")).tokenize("<|assistant|>\n  Hello")
    assert (spans.starts[0], spans.ends[0]) == (0, len("<|assistant|>"))
    assert not spans.overlapping(len("<|assistant|>\n"), 99)[0]


def test_overlap_counts_shared_characters_and_places_without_width():
    spans = TokenSpans(
        np.arange(6, dtype=np.int32),
        np.array([-1, 0, 3, 3, 3, 4], dtype=np.int64),  # a prefix, "abc", a token of no width, two that share "é", "d"
        np.array([-1, 3, 3, 4, 4, 5], dtype=np.int64),
    )
    assert spans.overlapping(3, 4).tolist() == [False, False, True, True, True, False]
    assert spans.overlapping(0, 3).tolist() == [False, True, False, False, False, False]
    assert spans.overlapping(3, 3).tolist() == [False] * 6
    assert [spans.is_cut_at(place) for place in range(6)] == [False, True, True, False, False, False]


def test_special_tokens_match_longest_first(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im"]})
    pattern = special_token_pattern(tokenizer)
    assert pattern.findall("a<|im_end|><|im<think>") == ["<|im_end|>", "<|im"]


def test_padding_that_a_tokenizer_does_by_itself_is_left_out(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    plain = SpanTokenizer(tokenizer).tokenize("Hello you").ids.tolist()
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert SpanTokenizer(tokenizer).tokenize("Hello you").ids.tolist() == plain
