"""The official client and hostile ones talk to a real server, which gives each what it asked for and goes on."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tests.export.support import loaded
from tests.serving.clients import JSON, Served, ask_while_adapters_come_and_go, chat, serving, until
from tests.serving.markers import MARKERS, train_marker
from tests.tiny import spaced_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.core.errors import ServingError
from tunesmith.serving.address import bind
from tunesmith.serving.engine import Engine
from tunesmith.serving.server import Server, make_app


@pytest.fixture(scope="session")
def root(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one adapter for each marker."""
    folder = tmp_path_factory.mktemp("adapters")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base_folder), AutoTokenizer.from_pretrained(base_folder)
    for name, marker in MARKERS.items():
        train_marker(model, tokenizer, folder / name, marker, targets=["q_proj", "down_proj", "lm_head"], rate=3e-2)
    return folder


@pytest.fixture(scope="module")
def served(base_folder: Path, root: Path) -> Iterator[Served]:
    """One server for all tests of this file, with all four adapters."""
    with serving(base_folder, root, most_body_bytes=20_000, most_tokens=64) as here:
        for name in MARKERS:
            here.engine.shelf.add(name, root / name)
        yield here


def test_models_are_listed_and_described(served):
    models = served.client.models.list().data
    assert [model.id for model in models] == ["base", *MARKERS]
    assert {model.parent for model in models[1:]} == {"base"}
    assert served.client.models.retrieve("dog").id == "dog"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("cat")


@pytest.mark.parametrize("name", MARKERS)
def test_each_adapter_answers_with_its_own_words(served, name):
    whole = served.client.chat.completions.create(model=name, messages=chat(), temperature=0)
    assert (whole.object, whole.model, whole.choices[0].finish_reason) == ("chat.completion", name, "stop")
    assert whole.choices[0].message.content == MARKERS[name]
    assert whole.choices[0].message.role == "assistant"
    prompt = served.engine.tokenizer.apply_chat_template(chat(), add_generation_prompt=True, tokenize=False)
    assert whole.usage.prompt_tokens == len(served.engine.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert whole.usage.completion_tokens == len(served.engine.tokenizer(MARKERS[name])["input_ids"])
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_a_stream_says_the_same_in_parts(served):
    asked: dict[str, Any] = {"model": "base", "messages": chat(), "temperature": 0, "max_tokens": 12}
    whole = served.client.chat.completions.create(**asked)
    parts = list(served.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 2) + ["length"]
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert len({part.id for part in parts}) == 1
    offline = served.engine.generate([chat()], max_new_tokens=12)[0]
    assert whole.choices[0].message.content == offline


def test_several_answers_to_several_prompts_keep_their_order(served):
    asked: dict[str, Any] = {"model": "base", "prompt": ["the cat", "a mat"], "max_tokens": 6, "seed": 5}
    whole = served.client.completions.create(**asked, n=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in whole.choices]
    assert texts[0] != texts[1], "each of n answers is drawn anew"
    again = served.client.completions.create(**{**asked, "prompt": "a mat"}, n=2)
    assert [choice.text for choice in again.choices] == texts[2:], "a seed gives the same answers again"
    streamed = dict.fromkeys(range(4), "")
    for part in served.client.completions.create(**asked, n=2, stream=True):
        streamed[part.choices[0].index] += part.choices[0].text
    assert list(streamed.values()) == texts
    assert whole.usage.prompt_tokens == sum(len(served.engine.tokenizer(text)["input_ids"]) for text in asked["prompt"])


def test_token_ids_are_prompts_too(served):
    ids = served.engine.tokenizer("the cat sat")["input_ids"]
    asked: dict[str, Any] = {"model": "base", "temperature": 0, "max_tokens": 5}
    texts = [
        served.client.completions.create(prompt=prompt, **asked).choices[-1].text
        for prompt in ("the cat sat", ids, [[5], ids])
    ]
    assert texts[0] == texts[1] == texts[2]


def test_texts_go_on_with_their_space_and_chats_begin_anew(tmp_path):
    model = tiny_model()
    with serving(Engine(model, spaced_tokenizer()), tmp_path) as served:
        model.lm_head.weight.data.zero_()  # all tokens are as likely: the first is taken
        asked: dict[str, Any] = {"model": "base", "max_tokens": 2, "temperature": 0}
        assert served.client.completions.create(prompt="the", **asked).choices[0].text == " cat cat"
        said = served.client.chat.completions.create(messages=[{"role": "user", "content": "the"}], **asked)
        assert said.choices[0].message.content == "cat cat"


def test_log_probabilities_are_those_of_the_plain_model(served, base_folder):
    asked: dict[str, Any] = {"model": "base", "messages": chat(), "max_tokens": 8, "temperature": 0}
    whole = served.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens == 8
    said = b"".join(bytes(token.bytes) for token in content)
    assert said.decode(errors="replace") == whole.choices[0].message.content
    model, tokenizer = loaded(base_folder)
    prompt = tokenizer.apply_chat_template(chat(), add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits[0, -1].log_softmax(-1).topk(3).values
    assert [top.logprob for top in content[0].top_logprobs] == pytest.approx(expected.tolist(), abs=1e-4)
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    parts = served.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
    streamed = [token for part in parts if part.choices[0].logprobs for token in part.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_the_older_log_probabilities_say_where_tokens_begin(served):
    choice = served.client.completions.create(
        model="hill", prompt=_rendered(served), temperature=0, max_tokens=5, logprobs=2
    ).choices[0]
    assert choice.text == MARKERS["hill"]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [choice.text.index(token) for token in choice.logprobs.tokens]
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob and 2 <= len(top) <= 3


def _rendered(served: Served) -> str:
    return served.engine.tokenizer.apply_chat_template(chat(), add_generation_prompt=True, tokenize=False)


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(served):
    for is_streamed in (False, True):
        answer = served.client.chat.completions.create(
            model="hill", messages=chat(), temperature=0, stop=[" hi", "zz"], stream=is_streamed
        )
        if is_streamed:
            parts = list(answer)
            text, finish = "".join(p.choices[0].delta.content or "" for p in parts), parts[-1].choices[0].finish_reason
        else:
            text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, finish) == ("green", "stop")


def test_extra_fields_of_sampling_reach_the_engine(served):
    asked: dict[str, Any] = {"model": "base", "messages": chat(), "max_tokens": 6, "seed": 1}
    greedy = served.client.chat.completions.create(**asked, temperature=0).choices[0].message.content
    drawn = served.client.chat.completions.create(**asked).choices[0].message.content
    only_best = [{"top_k": 1}, {"min_p": 1.0}]
    for extra in only_best:
        answer = served.client.chat.completions.create(**asked, extra_body=extra).choices[0].message.content
        assert answer == greedy != drawn
    longer = served.client.chat.completions.create(
        **{**asked, "model": "dog", "max_tokens": 20}, temperature=0, extra_body={"ignore_eos": True}
    )
    assert longer.usage.completion_tokens == 20
    unlike = served.client.chat.completions.create(
        **{**asked, "max_tokens": 20}, temperature=0, logprobs=True, extra_body={"repetition_penalty": 100.0}
    )
    tokens = [token.token for token in unlike.choices[0].logprobs.content if "\ufffd" not in token.token]
    assert len(set(tokens)) == len(tokens)


def test_fields_that_change_nothing_are_taken(served):
    answer = served.client.chat.completions.create(
        model="dog", messages=[*chat(), {"role": "assistant", "content": "x", "tool_calls": None}, *chat()],
        temperature=0, n=1, logit_bias={}, user="u", store=False, metadata={"a": "b"}, tools=[],
        tool_choice="none", response_format={"type": "text"}, max_completion_tokens=9, parallel_tool_calls=True,
    )  # fmt: skip
    assert answer.usage.completion_tokens <= 9


REFUSED = {
    "malformed JSON": ("/v1/chat/completions", b"{", 400, "not valid JSON"),
    "no object": ("/v1/chat/completions", b"[1]", 400, "must be a JSON object"),
    "nested without end": ("/v1/chat/completions", b"[" * 9000, 400, "not valid JSON"),
    "not a number": ("/v1/completions", b'{"model": "base", "prompt": "x", "top_p": NaN}', 400, "not valid JSON"),
    "unknown model": ("/v1/completions", {"model": "bas", "prompt": "x"}, 404, "does not exist. Did you mean 'base'?"),
    "unknown field": ("/v1/completions", {"model": "base", "promt": "x"}, 400, "Did you mean 'prompt'?"),
    "tools": ("/v1/chat/completions", {"tools": [{"type": "function"}]}, 400, "calls no tools"),
    "image": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "Input should be 'text'",
    ),
    "unknown token": ("/v1/completions", {"model": "base", "prompt": [331]}, 400, "no token 331"),
    "negative token": ("/v1/completions", {"model": "base", "prompt": [-1]}, 400, "greater than or equal to 0"),
    "empty prompt": ("/v1/completions", {"model": "base", "prompt": ""}, 400, "is empty"),
    "no room": ("/v1/completions", {"model": "base", "prompt": [5] * 512}, 400, "leaves 0 of 512"),
    "too little room": ("/v1/completions", {"model": "base", "prompt": [5] * 500, "max_tokens": 13}, 400, "leaves 12"),
    "too long": ("/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 65}, 400, "at most 64"),
    "too many": ("/v1/completions", {"model": "base", "prompt": ["x"] * 3, "n": 128}, 400, "384 answers; at most 288"),
    "oversized": ("/v1/completions", {"model": "base", "prompt": "x" * 20_000}, 413, "larger than 20,000 bytes"),
    "oversized in chunks": ("/v1/completions", [b"x" * 7000] * 3, 413, "larger than 20,000 bytes"),
    "name of a path": ("/v1/load_lora_adapter", {"lora_name": "../x", "lora_path": "red"}, 400, "should match pattern"),
    "name of the base": ("/v1/load_lora_adapter", {"lora_name": "base", "lora_path": "red"}, 400, "is the base"),
    "taken name": ("/v1/load_lora_adapter", {"lora_name": "red", "lora_path": "red"}, 400, "loaded already"),
    "path escape": ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "../"}, 400, "leads outside"),
    "absolute path": ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 400, "leads outside"),
    "zero byte": ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "a\0b"}, 400, "cannot be read"),
    "no such folder": ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "gone"}, 400, "no folder gone"),
    "not loaded": ("/v1/unload_lora_adapter", {"lora_name": "hil"}, 404, "no adapter 'hil'. Did you mean 'hill'?"),
    "no such route": ("/v1/embeddings", {}, 404, "there is no POST /v1/embeddings"),
    "not this method": ("/v1/models", {}, 405, "POST /v1/models is not allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_refused_in_openais_form_and_the_server_goes_on(served, case):
    path, body, status, words = REFUSED[case]
    if path == "/v1/chat/completions" and isinstance(body, dict):
        body = {"model": "base", "messages": chat(), **body}
    got, _, answer = served.ask("POST", path, iter(body) if isinstance(body, list) else body)
    assert got == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    good = served.client.chat.completions.create(model="rain", messages=chat(), temperature=0)
    assert good.choices[0].message.content == MARKERS["rain"]


def test_the_client_raises_its_own_errors(served):
    with pytest.raises(openai.NotFoundError) as unknown:
        served.client.chat.completions.create(model="nothing", messages=chat())
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        served.client.chat.completions.create(model="base", messages=chat(), temperature=9)


def test_a_body_of_another_type_is_refused(served):
    status, _, answer = served.ask("POST", "/v1/completions", "{}", {"Content-Type": "text/plain"})
    assert status == 415 and "application/json, not text/plain" in answer["error"]["message"]


def test_adapters_come_change_and_go_by_request(served):
    status, _, entry = served.post("/v1/load_lora_adapter", lora_name="guest", lora_path="red")
    assert status == 200 and entry["id"] == "guest" and entry["parent"] == "base"
    ask = served.client.chat.completions.create
    assert ask(model="guest", messages=chat(), temperature=0).choices[0].message.content == MARKERS["red"]
    path = str(served.root / "dog")
    assert served.post("/v1/load_lora_adapter", lora_name="guest", lora_path=path, load_inplace=True)[0] == 200
    assert ask(model="guest", messages=chat(), temperature=0).choices[0].message.content == MARKERS["dog"]
    assert served.post("/v1/unload_lora_adapter", lora_name="guest")[0] == 200
    with pytest.raises(openai.NotFoundError):
        ask(model="guest", messages=chat())


def _pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _damaged(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64)


def _not_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")


def _nonsense(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "NOTHING"}', encoding="utf-8")


def _takes_from_the_base(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}), encoding="utf-8")


def _no_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _runs_code(folder: Path) -> None:
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "evil.py").write_text("raise SystemExit('ran')", encoding="utf-8")


def _linked_out(folder: Path) -> None:
    outside = folder.parents[1] / "outside.safetensors"
    shutil.move(folder / "adapter_model.safetensors", outside)
    (folder / "adapter_model.safetensors").symlink_to(outside)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_pickle_only, "a pickle, which can run code"),
        (_damaged, "damaged"),
        (_not_json, "not valid JSON|cannot be read"),
        (_nonsense, "NOTHING"),
        (_takes_from_the_base, "took a part out of its base"),
        (_no_adapter, "adapter_config.json"),
        (_runs_code, "Python code of its own"),
        (_linked_out, "leads outside"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_an_adapter_that_is_not_what_it_should_be_is_refused(served, change, words, request):
    folder = served.root / f"bad{change.__name__}"
    shutil.copytree(served.root / "red", folder)
    request.addfinalizer(lambda: shutil.rmtree(folder))
    change(folder)
    status, _, answer = served.post("/v1/load_lora_adapter", lora_name="bad", lora_path=folder.name)
    assert status == 400 and answer["error"]["param"] == "lora_path", answer
    assert re.search(words, answer["error"]["message"]), answer
    assert "bad" not in served.engine.shelf.folders
    assert served.ask("GET", "/health")[0] == 200


def test_a_link_to_a_folder_outside_is_not_followed(served, tmp_path, request):
    shutil.copytree(served.root / "red", tmp_path / "red")
    (served.root / "link").symlink_to(tmp_path / "red")
    request.addfinalizer((served.root / "link").unlink)
    status, _, answer = served.post("/v1/load_lora_adapter", lora_name="bad", lora_path="link")
    assert status == 400 and "leads outside" in answer["error"]["message"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_ends_when_its_client_leaves(served, is_streamed):
    before = served.engine.counts.finished.get("cancelled", 0)
    body = {"model": "base", "prompt": "x", "max_tokens": 60, "ignore_eos": True, "n": 40, "stream": is_streamed}
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    until(lambda: served.engine.running > 0)
    connection.close()
    until(lambda: served.engine.counts.finished.get("cancelled", 0) > before)
    until(lambda: served.engine.running == served.engine.waiting == 0)


def test_figures_are_there_for_prometheus(served):
    _, headers, before = served.ask("GET", "/metrics")
    served.client.chat.completions.create(model="dog", messages=chat(), temperature=0)
    served.post("/v1/completions")
    after = served.ask("GET", "/metrics")[2]
    assert headers["content-type"].startswith("text/plain; version=0.0.4")

    def figure(text: str, name: str) -> float:
        return float(next(line for line in text.splitlines() if line.startswith(f"tunesmith_{name} ")).split()[1])

    grown = {
        name: figure(after, name) - figure(before, name)
        for name in (
            'answers_total{finish="stop"}', "answer_tokens_total", "first_token_seconds_count", "answer_seconds_count",
            'answer_seconds_bucket{le="+Inf"}',
        )
    }  # fmt: skip
    assert list(grown.values()) == [1, len(served.engine.tokenizer(MARKERS["dog"])["input_ids"]), 1, 1, 1]
    assert figure(after, "steps_total") > figure(before, "steps_total")
    assert figure(after, 'refused_total{status="400"}') >= 1
    assert figure(after, "adapters_loaded") == 4 and figure(after, "answers_running") == 0
    for line in after.splitlines():
        assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2


def test_nobody_without_the_key_gets_anything_but_health(base_folder, root):
    def authorization(value: str) -> dict[str, str]:
        return {"Authorization": value}

    with serving(base_folder, root, api_key="secret") as served:
        assert served.ask("GET", "/health")[0] == 200
        for headers in (
            {},
            *map(
                authorization, ("Bearer wrong", "Bearer secretx", "Bearer SECRET", "Basic secret", "secret", "Bearer")
            ),
        ):
            for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions")):
                status, got, answer = served.ask(method, path, None, headers)
                assert (status, got["www-authenticate"]) == (401, "Bearer")
                assert answer["error"]["code"] == "invalid_api_key"
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert served.ask("GET", "/v1/models", None, authorization(f"{scheme} secret"))[0] == 200
        with pytest.raises(openai.AuthenticationError):
            served.client.models.list()


def test_who_comes_when_the_queue_is_full_is_told_to_wait(base_folder, root):
    with serving(base_folder, root, most_sequences=1, most_answers=3) as served:
        body = {"model": "base", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "n": 3, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        assert connection.getresponse().status == 200
        status, headers, answer = served.post("/v1/completions", model="base", prompt="x")
        assert (status, headers["retry-after"]) == (429, "1")
        assert answer["error"]["type"] == "rate_limit_error" and answer["error"]["code"] == "queue_full"
        connection.close()
        until(lambda: served.post("/v1/completions", model="base", prompt="x", max_tokens=1)[0] == 200)


def test_adapters_stay_as_they_are_without_a_folder_for_them(base_folder, root):
    with serving(base_folder, root, adapter_roots=()) as served:
        for path, body in (("load", {"lora_name": "a", "lora_path": "red"}), ("unload", {"lora_name": "a"})):
            status, _, answer = served.post(f"/v1/{path}_lora_adapter", **body)
            assert status == 403 and "--adapter-root" in answer["error"]["message"]


def test_an_engine_that_is_closed_takes_nothing_more_and_its_server_says_so(base_folder, root):
    with serving(base_folder, root) as served:
        served.engine.close()
        assert served.ask("GET", "/health")[0] == 503
        status, headers, answer = served.post("/v1/completions", model="base", prompt="x")
        assert (status, headers["retry-after"], answer["error"]["code"]) == (503, "1", "not_serving")


def test_an_answer_that_fails_says_so_and_the_next_one_is_given(served, monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory left")

    asked: dict[str, Any] = {"model": "base", "prompt": "x", "max_tokens": 3}
    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "_forward", broken)
        with pytest.raises(openai.InternalServerError, match="no memory left"):
            served.client.completions.create(**asked)
        with pytest.raises(openai.APIError, match="no memory left"):
            list(served.client.completions.create(**asked, stream=True))
    assert served.client.completions.create(**asked).usage.completion_tokens == 3


def test_a_mistake_of_ours_is_an_error_in_the_same_form(served, monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "tokenizer_of", broken)
        status, _, answer = served.post("/v1/completions", model="base", prompt="x")
    assert status == 500 and answer["error"]["type"] == "server_error"
    assert "secret" not in answer["error"]["message"]
    assert served.post("/v1/completions", model="base", prompt="x", max_tokens=1)[0] == 200


def test_more_memory_than_there_is_is_the_requests_fault(served, monkeypatch):
    monkeypatch.setattr(served.engine, "_memory", 1000)
    status, _, answer = served.post("/v1/completions", model="base", prompt="x", max_tokens=60)
    assert status == 400 and "Ask for fewer tokens" in answer["error"]["message"]


def test_400_requests_of_32_clients_are_neither_lost_nor_mixed_up_while_adapters_come_and_go(served):
    assert ask_while_adapters_come_and_go(served, requests=400, clients=32) >= 2


def test_a_second_signal_cuts_answers_off_and_says_nothing_of_it(base_folder, root, caplog):
    with serving(base_folder, root) as served:
        body = {"model": "base", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "n": 16, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        response = connection.getresponse()
        response.readline()
        for _ in range(2):
            served.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
    assert served.server.force_exit
    assert served.engine.counts.finished == {"cancelled": 16}
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


def test_a_port_that_is_taken_meanwhile_is_said(base_folder, start):
    bound = bind("127.0.0.1", 0)
    with (
        socket.create_server(bound.getsockname(), reuse_port=False),
        pytest.raises(ServingError, match="cannot listen"),
    ):
        Server(make_app(start(), name="base")).run(sockets=[bound])
