"""Rendered text: markers are derived, answers are found, and the result equals the conversation's own."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.data.markers import Markers, derive_markers, find_answers, resolve_markers, response_mask
from tunesmith.data.masks import ExampleEncoder
from tunesmith.data.types import Conversation, RowRefusedError, Text, Tokens

from .chat_families import template_text
from .conversations import random_conversation

AGREEING = ["chatml", "llama-3", "llama-3-original", "mistral", "mistral-pieces", "mistral-plain-markers", "gemma"]
AGREEING += ["gemma-original", "phi-3", "deepseek-r1"]
WITHOUT_SYSTEM = {"gemma-original"}
CHATML = Markers("<|im_start|>user\n", "<|im_start|>assistant\n", ("<|im_end|>",), True)


def rendered(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def refusal(text: str, **options) -> RowRefusedError:
    with pytest.raises(RowRefusedError) as caught:
        find_answers(text, CHATML, **options)
    return caught.value


@pytest.mark.parametrize(
    ("family", "instruction_part", "response_part", "ends"),
    [
        ("chatml", "<|im_start|>user\n", "<|im_start|>assistant\n", ("<|im_end|>",)),
        ("qwen3", "<|im_start|>user\n", "<|im_start|>assistant\n", ("<|im_end|>",)),
        (
            "llama-3",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ("<|eot_id|>",),
        ),
        ("gemma", "<start_of_turn>user\n", "<start_of_turn>model\n", ("<end_of_turn>",)),
        ("mistral", "[INST]", "[/INST]", ("</s>",)),
        ("gpt-oss", "<|start|>user<|message|>", "<|start|>assistant", ("<|return|>", "<|end|>")),
        ("phi-3", "<|user|>\n", "<|end|>\n<|assistant|>\n", ("<|end|>",)),
        ("deepseek-r1", "<｜User｜>", "<｜Assistant｜>", ("<｜end▁of▁sentence｜>",)),
    ],
)
def test_markers_are_derived_from_the_template(chat_tokenizer, family, instruction_part, response_part, ends):
    markers = derive_markers(chat_tokenizer(family))
    assert (markers.instruction_part, markers.response_part, markers.ends) == (instruction_part, response_part, ends)


def test_a_think_block_that_only_the_last_answer_has_is_no_part_of_the_marker(chat_tokenizer):
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.chat_template = template_text("trl:qwen3_5_think")
    assert derive_markers(tokenizer).response_part == "<|im_start|>assistant\n"


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("family", AGREEING)
def test_rendered_text_trains_what_the_conversation_trains(chat_tokenizer, family, train_on):
    tokenizer = chat_tokenizer(family)
    encoder = ExampleEncoder(tokenizer, train_on=train_on)
    markers = resolve_markers(tokenizer)
    for seed in range(80):
        messages = random_conversation(seed, system=family not in WITHOUT_SYSTEM)
        example = Conversation(messages, (None,) * len(messages), "x", "messages")
        (wanted,) = encoder.encode(example)
        (found,) = encoder.encode(Text(encoder.render(example), "x"))
        assert found.input_ids.tolist() == wanted.input_ids.tolist()
        assert np.flatnonzero(found.trained).tolist() == np.flatnonzero(wanted.trained).tolist()
        assert found.end_of_turn == wanted.end_of_turn
        by_ids = response_mask(wanted.input_ids, tokenizer, markers, last_only=train_on == "last")
        assert np.flatnonzero(by_ids).tolist() == np.flatnonzero(wanted.trained).tolist()


@pytest.mark.parametrize("train_on", [None, "assistant", "last"])
def test_ids_without_a_mask_train_the_answers_that_are_asked_for(chat_tokenizer, train_on):
    tokenizer = chat_tokenizer("chatml")
    encoder = ExampleEncoder(tokenizer, train_on=train_on)
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    (wanted,) = encoder.encode(Conversation(messages, (None,) * 4, "x", "messages"))
    everything = np.ones(len(wanted), dtype=np.bool_)
    (found,) = encoder.encode(Tokens(wanted.input_ids, everything, "x"))
    assert found.trained.tolist() == (everything if train_on is None else wanted.trained).tolist()
    own = np.arange(len(wanted)) % 2 == 1
    assert encoder.encode(Tokens(wanted.input_ids, own, "x"))[0].trained.tolist() == own.tolist()
    spare = np.concatenate([[len(tokenizer) + 3], wanted.input_ids])
    assert response_mask(spare, tokenizer, resolve_markers(tokenizer)).sum() > 0


@pytest.mark.parametrize("family", ["chatml", "mistral-pieces"])
def test_ids_that_were_cut_train_what_is_left(chat_tokenizer, family):
    tokenizer = chat_tokenizer(family)
    markers = resolve_markers(tokenizer)
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because of the data"}]
    (whole,) = ExampleEncoder(tokenizer).encode(Conversation(messages, (None, None), "x", "messages"))
    for length in range(int(np.argmax(whole.trained)) + 1, len(whole)):
        mask = response_mask(whole.input_ids[:length], tokenizer, markers)
        assert mask.tolist() == whole.trained[:length].tolist()


@pytest.mark.parametrize("family", ["llama-3", "gemma", "mistral-pieces"])
def test_a_bos_that_was_stripped_from_the_text_comes_back_once(chat_tokenizer, family):
    tokenizer = chat_tokenizer(family)
    encoder = ExampleEncoder(tokenizer, train_on="assistant")
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    text = encoder.render(Conversation(messages, (None, None), "x", "messages"))
    (whole,) = encoder.encode(Text(text, "x"))
    (stripped,) = encoder.encode(Text(text.removeprefix(tokenizer.bos_token), "x"))
    assert stripped.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert stripped.end_of_turn == (stripped.trained.nonzero()[0][-1],)
    assert tokenizer.decode(stripped.input_ids) == tokenizer.decode(whole.input_ids)


def test_answers_end_before_the_next_marker():
    text = rendered(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    assert [text[a.start : a.end] for a in find_answers(text, CHATML)] == ["one<|im_end|>", "two<|im_end|>"]
    unclosed = text.replace("one<|im_end|>", "one")
    assert refusal(unclosed).reason == "end of turn not found" and "before the next marker" in str(refusal(unclosed))


def test_text_without_answers_is_refused():
    assert refusal("just text").reason == "response marker not found"
    unanswered = rendered(("user", "a")) + "<|im_start|>assistant\n"
    assert refusal(unanswered).reason == "response marker not found"


def test_an_open_answer_is_refused_unless_the_text_was_cut():
    text = rendered(("user", "a"), ("assistant", "one")) + "<|im_start|>assistant\n"
    assert len(find_answers(text, CHATML)) == 1  # a generation prompt is no answer
    text += "two"
    assert refusal(text).reason == "end of turn not found" and "before the end of the text" in str(refusal(text))
    closed, left = find_answers(text, CHATML, may_end_open=True)
    assert closed.is_closed and not left.is_closed and text[left.start : left.end] == "two"


def test_rows_that_do_not_match_are_refused_by_the_encoder(chat_tokenizer):
    with pytest.raises(RowRefusedError, match="with an answer behind it") as caught:
        ExampleEncoder(chat_tokenizer("chatml"), train_on="assistant").encode(Text("just text", "x"))
    assert caught.value.reason == "response marker not found"


def test_given_markers_serve_text_of_a_base_model(chat_tokenizer):
    """No template: an answer ends at EOS, which is put behind the text once."""
    tokenizer = chat_tokenizer("llama-3")
    tokenizer.chat_template = None
    markers = {"instruction_part": "### Instruction:\n", "response_part": "### Response:\n"}
    encoder = ExampleEncoder(tokenizer, **markers)
    text = "### Instruction:\nAdd one.\n\n### Response:\nDone."
    for row in (text, text + tokenizer.eos_token):
        (document,) = encoder.encode(Text(row, "x"))
        assert tokenizer.decode(document.input_ids[document.trained]) == "Done.<|eot_id|>"
        assert document.end_of_turn == (len(document) - 1,)
        assert document.input_ids.tolist().count(tokenizer.bos_token_id) == 1
        assert response_mask(document.input_ids, tokenizer, resolve_markers(tokenizer, **markers)).tolist() == (
            document.trained.tolist()
        )


def test_given_markers_keep_the_templates_end_of_turn(chat_tokenizer):
    tokenizer = chat_tokenizer("gemma")
    markers = resolve_markers(tokenizer, "<start_of_turn>user", "<start_of_turn>model")
    assert markers == Markers("<start_of_turn>user", "<start_of_turn>model", ("<end_of_turn>",), True)


@pytest.mark.parametrize(
    "parts", [("<|im_start|>user\n", None), (None, "<|im_start|>assistant\n"), ("", "x"), ("x", "")]
)
def test_markers_are_given_both_or_none(chat_tokenizer, parts):
    with pytest.raises(SettingsError, match=r"instruction_part=.*response_part=.*give both.*or none"):
        ExampleEncoder(
            chat_tokenizer("chatml"), train_on="assistant", instruction_part=parts[0], response_part=parts[1]
        )


def test_markers_cannot_come_from_nothing(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match="no marker between a question and its answer"):
        derive_markers(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no chat here') }}"
    with pytest.raises(ModelError, match=r"no chat here.*Pass both instruction_part= and response_part="):
        derive_markers(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template.*instruction_part=.*chat_template="):
        ExampleEncoder(tokenizer, train_on="assistant").encode(Text("just text", "x"))
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a chat template nor an EOS token"):
        resolve_markers(tokenizer, "Q:", "A:")
