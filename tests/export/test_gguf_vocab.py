"""What becomes of a tokenizer in GGUF."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from gguf import TokenType
from tests import tiny, tiny_tasks
from tests.export.tokenizers_of import QWEN, composing, spaced, with_template
from tokenizers import Regex, pre_tokenizers

from tunesmith.core.errors import ExportError
from tunesmith.export.gguf.vocab import read_vocabulary

ROWS = tiny.VOCABULARY
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def with_cut(*parts: Any) -> Any:
    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    return tokenizer


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def test_tokens_kinds_merges_and_special_tokens_are_those_of_the_tokenizer() -> None:
    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    tokenizer.add_tokens(["plain"])
    found = read_vocabulary(tokenizer, ROWS, stops=[tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    size = len(tokenizer)
    assert (found.model, found.cut, len(found.tokens), found.scores) == ("gpt2", "gpt-2", ROWS, [])
    assert found.tokens[:size] == tokenizer.convert_ids_to_tokens(range(size))
    assert found.tokens[size:] == [f"[UNUSED{index}]" for index in range(size, ROWS)]
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert kinds["<|im_end|>"] == TokenType.CONTROL and kinds["plain"] == TokenType.USER_DEFINED
    assert kinds["a"] == TokenType.NORMAL and kinds[found.tokens[-1]] == TokenType.UNUSED
    end, text_end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|pad|>"])
    assert found.special == {"eos": end, "padding": pad} and found.stops == (end, text_end)
    assert found.merges[0].count(" ") == 1 and found.template == tokenizer.chat_template
    assert not found.adds_bos and not found.adds_eos


def test_the_end_of_a_turn_is_told_beside_the_end_of_a_text() -> None:
    tokenizer = with_template("llama-3")
    tokenizer.eos_token = "<|endoftext|>"
    found = read_vocabulary(tokenizer, ROWS)
    turn, text = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|endoftext|>"])
    assert (found.special["eot"], found.special["eos"], found.stops) == (turn, text, (turn, text))


def test_an_end_that_the_tokenizer_does_not_have_is_none() -> None:
    tokenizer = tiny.tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert read_vocabulary(tokenizer, 331, [end, 330, 7]).stops == (end, 7)


@pytest.mark.parametrize(
    ("parts", "ignores", "name"),
    [
        ((pre_tokenizers.ByteLevel(add_prefix_space=False),), False, "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)), False,
         "smollm"),
        ((split(QWEN), BYTES), False, "qwen2"),
        ((split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)), BYTES), True, "llama-bpe"),
        ((split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)), BYTES), False, "smaug-bpe"),
    ],
)  # fmt: skip
def test_the_way_text_is_cut_is_recognized_by_what_it_is(parts: Any, ignores: bool, name: str) -> None:
    tokenizer = with_cut(*parts)
    tokenizer.backend_tokenizer.model.ignore_merges = ignores
    model = tokenizer.backend_tokenizer.model
    model.ignore_merges = ignores
    tokenizer.backend_tokenizer.model = model
    assert read_vocabulary(tokenizer, ROWS).cut == name


@pytest.mark.parametrize(
    "parts",
    [
        (split(r"\w+|\s"), BYTES),
        (pre_tokenizers.ByteLevel(add_prefix_space=True),),
        (pre_tokenizers.Whitespace(),),
        (pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    ],
)
def test_an_unknown_way_is_refused(parts: Any) -> None:
    with pytest.raises(ExportError, match=r"cuts no text as this tokenizer does, so no GGUF is written: .*pre_tok"):
        read_vocabulary(with_cut(*parts), ROWS)


def test_a_tokenizer_that_puts_other_tokens_around_a_text_is_refused() -> None:
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    with pytest.raises(ExportError, match=r"puts \[1\] before and \[\] behind a text"):
        read_vocabulary(tokenizer, ROWS)


@pytest.mark.parametrize(("template", "adds"), [(None, True), ("{{ bos_token }}{{ messages[0].content }}", True),
                                                ("{{ messages[0].content }}", False)])  # fmt: skip
def test_bos_is_added_where_training_saw_it(template: str | None, adds: bool) -> None:
    tokenizer = spaced()
    tokenizer.chat_template = template
    assert read_vocabulary(tokenizer, ROWS).adds_bos is adds


@pytest.mark.parametrize(
    ("scheme", "template", "adds", "note"),
    [
        ("always", None, True, "that begins with one too"),
        ("never", None, False, None),
        ("first", None, True, "puts a space behind each special token"),
        ("first", "{{ bos_token }}{{ messages[0].content }}", False, "puts no space before a text"),
    ],
)
def test_a_space_before_a_text_is_added_where_chats_need_it(
    scheme: str, template: str | None, adds: bool, note: str | None
) -> None:
    tokenizer = spaced(scheme=scheme)
    tokenizer.chat_template = template
    found = read_vocabulary(tokenizer, ROWS)
    assert found.adds_space is adds
    assert any(note in said for said in found.notes) if note else found.notes == []
    assert found.doubles_spaces is adds


def test_a_tokenizer_that_composes_characters_says_so() -> None:
    found = read_vocabulary(composing(), ROWS)
    assert found.cut == "qwen2" and "give it text in NFC" in found.notes[0]


def test_sentencepiece_scores_are_the_order_of_the_merges() -> None:
    found = read_vocabulary(spaced(), ROWS)
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert (found.model, found.cut, found.merges) == ("llama", None, [])
    assert score["▁t"] > score["▁th"] > score["▁the"] > score["▁c"] > score["a"]
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert kinds["<0x0A>"] == TokenType.BYTE and kinds["<unk>"] == TokenType.UNKNOWN
    assert found.adds_bos and found.adds_space
    assert not read_vocabulary(spaced(prepends=False), ROWS).adds_space


def test_merges_that_scores_cannot_say_are_refused() -> None:
    with pytest.raises(ExportError, match="would make the token '▁cat' of '▁c' and 'at', and this tokenizer not"):
        read_vocabulary(spaced(lossy=True), ROWS)


def test_what_is_no_bpe_or_has_more_tokens_than_rows_is_refused() -> None:
    with pytest.raises(ExportError, match="kind WordPiece is not written as GGUF"):
        read_vocabulary(tiny_tasks.tokenizer(), ROWS)
    with pytest.raises(ExportError, match="has 317 tokens and the model 300"):
        read_vocabulary(tiny.tiny_tokenizer(), 300)
    with pytest.raises(ExportError, match=r"object has no tokenizer.json behind it"):
        read_vocabulary(object(), ROWS)


def test_a_normalizer_that_llama_cpp_has_not_is_refused() -> None:
    from tokenizers import normalizers

    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ExportError, match=r"cuts no text as this tokenizer does, .*Lowercase"):
        read_vocabulary(tokenizer, ROWS)
