"""Every field of a request is applied or refused, and an error says which field and what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from tests import tiny

from tunesmith.models.sampling import Sampling
from tunesmith.serving.replies import TokenNames
from tunesmith.serving.schema import (
    _CHAT,
    _COMPLETION,
    ApiError,
    ChatRequest,
    CompletionRequest,
    LoadAdapter,
    parse,
)

TURN = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"model": "m", "messages": [TURN], **fields}).encode())


def text(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "x", **fields}).encode())


def refused(call: Any, **fields: Any) -> dict[str, Any]:
    with pytest.raises(ApiError) as found:
        call(**fields)
    assert found.value.status == 400
    return found.value.body["error"]


@pytest.mark.parametrize(
    ("kind", "params", "not_done"),
    [
        (ChatRequest, chat_create_params.CompletionCreateParamsBase, _CHAT),
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase, _COMPLETION),
    ],
)
def test_every_field_of_the_official_client_is_known(kind, params, not_done):
    assert set(params.__annotations__) - set(kind.model_fields) == set(not_done)


@pytest.mark.parametrize("name", _CHAT)
def test_what_is_not_done_is_refused_unless_it_changes_nothing(name):
    neutral, why = _CHAT[name]
    for value in (None, *neutral):
        assert chat(**{name: value}) == chat()
    error = refused(chat, **{name: {"any": "thing"}})
    assert error["param"] == name and error["code"] == "unsupported_parameter"
    assert error["message"] == f"{name} is not supported: {why}. Leave it out."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best_of": 2}, "best_of is not supported: answers are not ranked"),
        ({"echo": True}, "echo is not supported: the prompt is not repeated"),
        ({"prompt": []}, "prompt: List should have at least 1 item"),
        ({"prompt": [1, "a"]}, r"prompt[1]: Input should be a valid integer"),
        ({"prompt": [True]}, r"prompt[0]: Input should be a valid integer"),
        ({"prompt": 3}, "prompt: Input should be a text or a list"),
        ({"logprobs": True}, "logprobs: Input should be a valid integer"),
        ({"temprature": 1}, "unknown field temprature. Did you mean 'temperature'?"),
        ({"temperature": "1"}, "temperature: Input should be a valid number"),
        ({"temperature": 2.1}, "temperature: Input should be less than or equal to 2"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
        ({"n": True}, "n: Input should be a valid integer"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"top_k": 10**400}, "top_k: Input should be less than"),
        ({"seed": 2**63}, "seed: Input should be less than"),
        ({"stop": ""}, "stop: String should have at least 1 character"),
        ({"stop": ["a", ""]}, r"stop[1]: String should have at least 1 character"),
        ({"stop": ["a"] * 17}, "stop: List should have at most 16 items"),
        ({"stream_options": {"include_usage": True}}, "stream_options is only allowed with stream: true"),
        ({"stream": True, "stream_options": {"usage": True}}, "unknown field stream_options.usage"),
        ({"model": None}, "model: Input should be a valid string"),
    ],
)
def test_completions_say_what_is_wrong(fields, message):
    assert refused(text, **fields)["message"].startswith(message)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: List should have at least 1 item"),
        ([1], "messages[0]: Input should be a valid dictionary"),
        ([TURN, {"role": "user"}], "messages[1].content is missing"),
        ([{"role": "tool", "content": "x"}], "messages[0].role: Input should be 'system', 'developer', 'user' or"),
        ([{"role": "assistant", "content": None}], "messages[0].content: Input should be a text or a list"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls is not supported"),
        ([{**TURN, "name": "me"}], "messages[0].name is not supported"),
        ([{"role": "user", "contnt": "x"}], "unknown field messages[0].contnt. Did you mean 'content'?"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type: Input should be 'text'",
        ),
    ],
)
def test_messages_say_what_is_wrong(messages, message):
    error = refused(chat, messages=messages)
    assert error["message"].startswith(message)
    assert error["param"].startswith("messages")


def test_two_names_of_one_setting_must_agree():
    assert chat(max_completion_tokens=7).max_tokens == chat(max_tokens=7).max_tokens == 7
    assert "two names of one setting" in refused(chat, max_tokens=7, max_completion_tokens=8)["message"]


def test_log_probabilities_are_asked_for_in_two_ways():
    assert chat().logprobs_wanted is text().logprobs_wanted is None
    assert chat(logprobs=True).logprobs_wanted == text(logprobs=0).logprobs_wanted == 0
    assert chat(logprobs=True, top_logprobs=4).logprobs_wanted == text(logprobs=4).logprobs_wanted == 4
    assert "only allowed with logprobs: true" in refused(chat, top_logprobs=4)["message"]


def test_sampling_is_read_as_openai_means_it():
    assert chat().sampling == Sampling(1.0, 1.0, 0, 0.0, 1.0)
    assert chat(temperature=0.25, top_p=0.5, top_k=-1, min_p=0.1, repetition_penalty=1.5).sampling == Sampling(
        0.25, 0.5, 0, 0.1, 1.5
    )
    assert chat(stop="x").stops == ("x",) and chat(stop=["x", "y"]).stops == ("x", "y") and chat().stops == ()


def test_parts_of_text_are_joined_and_the_developer_is_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    read = chat(messages=[{"role": "developer", "content": parts}, TURN]).messages
    assert [message.plain for message in read] == [{"role": "system", "content": "a\nb"}, TURN]


def test_prompts_are_one_or_several_texts_or_rows_of_tokens():
    for prompt, expected in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])):
        assert text(prompt=prompt).prompts == expected


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"[" * 100_000])
def test_what_is_no_json_is_refused(body):
    with pytest.raises(ApiError, match="not valid JSON") as found:
        parse(ChatRequest, body)
    assert found.value.code == "invalid_json"


@pytest.mark.parametrize("name", ["", "a/b", "..\\x", "a b", "a\n", "x" * 129])
def test_names_of_adapters_are_no_paths(name):
    with pytest.raises(ApiError, match="lora_name"):
        parse(LoadAdapter, json.dumps({"lora_name": name, "lora_path": "x"}).encode())


def test_tokens_have_their_text_and_all_their_bytes():
    tokenizer = tiny.tiny_tokenizer()
    names = TokenNames(tokenizer)
    ids = tokenizer(" the cat é€")["input_ids"]
    read = [names.of(token) for token in ids]
    assert bytes(byte for _, own in read for byte in own).decode() == " the cat é€"
    assert read[0] == (" the", list(b" the"))
    assert "\ufffd" in read[-1][0] and len(read[-1][1]) == 1, "a part of a character has its byte alone"
    assert names.of(tokenizer.eos_token_id) == ("<|im_end|>", list(b"<|im_end|>"))
    assert names.of(330) == ("", []), "a row of the embedding without a token"


def test_tokens_of_sentencepiece_keep_the_space_before_them():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = [("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("<0xE2>", -3.0)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = TokenNames(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert names.of(1) == (" the", list(b" the"))
    assert names.of(3)[1] == [0xE2]
