"""Answers written side by side are those that each would be alone, whatever joins, leaves or fails beside them."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.export.support import loaded
from tests.tiny import FAMILIES, spaced_tokenizer, tiny_model, tiny_tokenizer

from tunesmith.core.errors import AdapterError, EvaluationError, ModelError, ServingError
from tunesmith.core.versions import keep_softcap
from tunesmith.engine.install import engine_of
from tunesmith.evaluation import generate_answers
from tunesmith.models.sampling import Sampling
from tunesmith.serving.engine import Engine, _text_of
from tunesmith.serving.request import Delta, Request

PROMPTS = ["the cat", "a much longer prompt about the dog that ran to the red house while rain fell", "x", "over every"]


def chats(count: int = len(PROMPTS)) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": PROMPTS[i % len(PROMPTS)] + " hill" * (i // 4)}] for i in range(count)]


def answer(engine: Engine, request: Request) -> tuple[str, list[Delta]]:
    deltas = list(engine.stream(request))
    return "".join(delta.text for delta in deltas), deltas


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text)["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_it_does_offline(family):
    model, tokenizer = tiny_model(family).eval(), tiny_tokenizer()
    keep_softcap(model)
    expected = generate_answers(model, tokenizer, chats(7), max_new_tokens=12)
    # Prompts are read in pieces of 7 tokens, three answers at a time: they join and leave one another's steps.
    engine = Engine(model, tokenizer, most_sequences=3, prompt_tokens=7)
    try:
        assert engine.generate(chats(7), max_new_tokens=12) == expected
    finally:
        engine.close()
    assert generate_answers(model, tokenizer, chats(7), max_new_tokens=12) == expected


def test_rows_of_one_batch_use_their_own_adapters(start, base_folder, adapter_folders):
    names = [None, "a", "b", "c", "d", "b", "a", None]
    expected = []
    for name, chat in zip(names, chats(len(names)), strict=True):
        model, tokenizer = loaded(adapter_folders[name] if name else base_folder)
        expected += generate_answers(model, tokenizer, [chat], max_new_tokens=10)
    assert len(set(expected)) == len(names)
    engine = start(adapter_folders, prompt_tokens=16)
    assert engine.generate(chats(len(names)), adapters=names, max_new_tokens=10) == expected
    assert engine.generate(chats(2), adapters="a", max_new_tokens=10)[1] == expected[1]


def test_closing_gives_the_model_back_as_it_was(base_folder, adapter_folders):
    model, tokenizer = loaded(base_folder)
    before = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8)
    modules = {name: type(module) for name, module in model.named_modules()}
    engine = Engine(model, tokenizer)
    engine.shelf.add("a", adapter_folders["a"])
    assert engine.generate(PROMPTS, adapters="a", max_new_tokens=8) != before
    engine.close()
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert engine_of(model) is not None
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8) == before


def test_an_answer_is_streamed_with_its_tokens_and_ends_with_its_reason(start):
    text, deltas = answer(start(), Request(ids("the cat"), max_new_tokens=9))
    choices = [choice for delta in deltas for choice in delta.choices]
    assert text == tiny_tokenizer().decode([choice.token for choice in choices], skip_special_tokens=True)
    assert [delta.finish for delta in deltas] == [None] * 8 + ["length"]


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(start):
    engine = start()
    whole, _ = answer(engine, Request(ids("the cat"), max_new_tokens=30))
    stop = whole[8:11]
    text, deltas = answer(engine, Request(ids("the cat"), max_new_tokens=30, stop=(stop, "never there")))
    assert text == whole[: whole.index(stop)]
    assert deltas[-1].finish == "stop"


def test_texts_and_tokens_go_on_with_their_space_and_chats_begin_anew():
    model = tiny_model()
    engine = Engine(model, spaced_tokenizer())
    model.lm_head.weight.data.zero_()  # all tokens are as likely: the first is taken
    try:
        prompts = ["the", [1], [{"role": "user", "content": "the"}]]
        assert engine.generate(prompts, max_new_tokens=2) == [" cat cat", " cat cat", "cat cat"]
    finally:
        engine.close()


def test_one_stop_string_is_a_text_and_one_prompt_is_not(start):
    engine = start()
    whole = engine.generate(["the cat"], max_new_tokens=30)[0]
    stop = whole[8:11]
    assert engine.generate(["the cat"], max_new_tokens=30, stop=stop) == [whole[: whole.index(stop)]]
    with pytest.raises(EvaluationError, match="prompts is a text; give a list"):
        engine.generate("the cat")


def test_log_probabilities_are_those_of_the_model(start, base_folder):
    _, deltas = answer(start(), Request(ids("the cat"), max_new_tokens=3, top_logprobs=4))
    tokens = list(ids("the cat"))
    model, _ = loaded(base_folder)
    for choice in (choice for delta in deltas for choice in delta.choices):
        with torch.no_grad():
            expected = model.eval()(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
        assert choice.logprob == pytest.approx(expected[choice.token].item(), abs=1e-4)
        assert [token for token, _ in choice.top] == expected.topk(4).indices.tolist()
        tokens.append(choice.token)


def test_a_seed_gives_the_same_answer_alone_and_in_company(start):
    engine = start()
    hot = Sampling(temperature=1.5, top_p=0.95)
    alone = [engine.generate([chat], max_new_tokens=12, sampling=hot, seed=5)[0] for chat in chats(4)]
    assert engine.generate(chats(4), max_new_tokens=12, sampling=hot, seed=5) == alone
    assert engine.generate(chats(4), max_new_tokens=12, sampling=hot, seed=6) != alone


def test_cancelled_requests_leave_and_others_go_on(start):
    engine = start(most_sequences=2)
    parts: dict[str, queue.SimpleQueue[Delta]] = {name: queue.SimpleQueue() for name in ("first", "second", "third")}
    long = Request(ids("the cat"), max_new_tokens=400, ignore_end=True)
    first, second = engine.submit(long, parts["first"].put), engine.submit(long, parts["second"].put)
    parts["second"].get(timeout=30)
    third = engine.submit(Request(ids("x"), max_new_tokens=3, ignore_end=True), parts["third"].put)
    first.cancel()
    assert _end(parts["first"]) == "cancelled"
    assert _end(parts["third"]) == "length"
    assert third.tokens and not second.is_cancelled
    waiting = engine.submit(long, parts["third"].put)
    waiting.cancel()
    assert _end(parts["third"]) == "cancelled"
    second.cancel()
    assert _end(parts["second"]) == "cancelled"


def test_prompts_are_read_in_the_order_in_which_they_came(start):
    """Answers end while others wait to be read: whoever came last must not get the place of the first."""
    engine, ended = start(prompt_tokens=4), []
    done = threading.Event()

    def tell(number: int, delta: Delta) -> None:
        if delta.finish is not None:
            ended.append(number)
        if len(ended) == 24:
            done.set()

    prompts = [ids("the cat sat on a mat and saw")[: 3 + number % 4] for number in range(24)]
    first = engine.submit(Request(ids("x"), max_new_tokens=400, ignore_end=True), lambda delta: None)
    for number, prompt in enumerate(prompts):
        engine.submit(Request(prompt, max_new_tokens=2, ignore_end=True), partial(tell, number))
    assert done.wait(60)
    first.cancel()
    assert ended == list(range(24))


def _end(parts: queue.SimpleQueue[Delta]) -> Any:
    while (delta := parts.get(timeout=30)).finish is None:
        pass
    return delta.finish


def test_leaving_a_stream_ends_its_request(start):
    engine = start()
    for _ in engine.stream(Request(ids("the cat"), max_new_tokens=400, ignore_end=True)):
        break
    for _ in range(300):
        if engine.running == 0:
            break
        time.sleep(0.02)
    assert engine.counts.finished == {"cancelled": 1}


def test_requests_that_cannot_be_served_are_refused(start):
    engine = start(memory_bytes=400_000)
    with pytest.raises(EvaluationError, match=r"3 tokens, which leaves 509 of 512 for the answer, not max_new"):
        engine.submit(Request((1, 2, 3), max_new_tokens=900), print)
    with pytest.raises(EvaluationError, match=r"the prompt is empty; .*top_p=0 must be above 0"):
        engine.submit(Request((), stop=("",), sampling=Sampling(top_p=0)), print)
    with pytest.raises(EvaluationError, match="there is no token 99999: the model knows 331"):
        engine.submit(Request((1, 99999)), print)
    with pytest.raises(
        EvaluationError,
        match=r"no token -1: the model knows 331; max_new_tokens=2\.5 must be a whole number; seed=0\.5 must",
    ):
        engine.submit(Request((-1, 1), 2.5, seed=0.5), print)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match=r"seed=\d+ must be a whole number of 64 bits"):
        engine.submit(Request((1,), seed=2**64), print)
    for seed in (-(2**63), 2**64 - 1):
        assert len(engine.generate([[1]], max_new_tokens=1, sampling=Sampling(1.0), seed=seed)) == 1
    with pytest.raises(AdapterError, match="there is no adapter 'nobody'"):
        engine.submit(Request((1,), adapter="nobody"), print)
    with pytest.raises(ServingError, match=r"need 0 MiB for keys and values, and there are 0\. Ask for fewer"):
        start(memory_bytes=1000).submit(Request((1,)), print)


def test_answers_that_would_not_fit_together_wait_for_one_another(start):
    engine = start()
    size = engine._cache.bytes_per_token
    engine._memory = 2 * 40 * size
    seen: list[int] = []
    parts: queue.SimpleQueue[Delta] = queue.SimpleQueue()

    def deliver(delta: Delta) -> None:
        seen.append(engine.running)
        parts.put(delta)

    for _ in range(5):
        engine.submit(Request(ids("the cat"), max_new_tokens=40 - len(ids("the cat")), ignore_end=True), deliver)
    assert [_end(parts) for _ in range(5)] == ["length"] * 5
    assert max(seen) == 2


def test_a_failed_step_ends_its_answers_and_the_next_ones_are_written(start, monkeypatch):
    engine = start()
    whole = engine.generate(["the cat"], max_new_tokens=4)
    real, calls = engine.model.forward, []

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory left")
        return real(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", fail_once)
    with pytest.raises(ServingError, match="an answer failed: RuntimeError: no memory left"):
        engine.generate(["the cat"], max_new_tokens=4)
    assert engine.generate(["the cat"], max_new_tokens=4) == whole


@pytest.mark.parametrize("factors", [(1e38, 1e-38), (1, 1e30)])
def test_an_adapter_whose_numbers_overflow_ends_its_own_answers_alone(start, adapter_folders, tmp_path, factors):
    huge = shutil.copytree(adapter_folders["a"], tmp_path / "huge")
    weights = load_file(huge / "adapter_model.safetensors")
    for name, weight in weights.items():
        weight *= factors["lora_B" in name]
    save_file(weights, huge / "adapter_model.safetensors")
    engine = start({"c": adapter_folders["c"], "huge": huge})
    long = Request(ids("the cat"), 90, "c", ignore_end=True)
    short = Request(ids("x"), 9, "c", Sampling(temperature=1.0), seed=1)
    expected = [answer(engine, request)[0] for request in (long, short)]
    texts: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    engine.submit(long, texts.put)
    told: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    engine.submit(Request(ids("the dog ran " * 9), 9, "huge"), told.put)
    ended = told.get(timeout=30)
    assert (ended.finish, ended.choices) == ("error", ())
    assert "adapter 'huge' gives infinite or NaN scores for the next token" in ended.error
    # It comes to lie where the other one's values were.
    assert answer(engine, short)[0] == expected[1]
    assert _text_of(texts) == expected[0]
    assert engine.counts.finished == {"length": 4, "error": 1}


def test_closing_finishes_what_was_taken_and_takes_no_more(start):
    engine = start()
    parts: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    engine.submit(Request(ids("the cat"), max_new_tokens=30, ignore_end=True), parts.put)
    engine.close()
    assert _end(parts) == "length"
    with pytest.raises(ServingError, match="closing"):
        engine.submit(Request((1,)), print)


def test_models_that_it_would_answer_wrongly_for_are_refused(monkeypatch):
    tokenizer = tiny_tokenizer()
    mamba = tiny_model("mamba")
    del mamba.config.num_attention_heads  # which a real one has not
    with pytest.raises(ModelError, match="MambaForCausalLM cannot be served"):
        Engine(mamba, tokenizer)
    with pytest.raises(ModelError, match="Lfm2ForCausalLM cannot be served"):
        Engine(tiny_model("lfm2"), tokenizer)
    from tunesmith.serving import attention

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        return attend(*args, **{**kwargs, "sliding_window": 2})

    attend = attention.attend
    monkeypatch.setattr(attention, "attend", forgetful)
    model = tiny_model().eval()
    with pytest.raises(ModelError, match="logits differ by"):
        Engine(model, tokenizer)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    attention.register()


def test_a_window_that_only_the_layers_know_is_kept():
    model, tokenizer = tiny_model("qwen2-moe", sliding_window=12).eval(), tiny_tokenizer()
    expected = generate_answers(model, tokenizer, chats(3), max_new_tokens=12, batch_size=1)
    engine = Engine(model, tokenizer)
    try:
        assert engine.generate(chats(3), max_new_tokens=12) == expected
    finally:
        engine.close()


def test_a_window_that_nobody_says_is_refused():
    with pytest.raises(ModelError, match=r"PhimoeForCausalLM cannot be served: its layers do not say how far back"):
        Engine(tiny_model("phimoe"), tiny_tokenizer())
    Engine(tiny_model("phimoe", sliding_window=512), tiny_tokenizer()).close()


def test_an_adapted_model_is_told_to_come_apart(base_folder, adapter_folders):
    model, tokenizer = loaded(adapter_folders["a"])
    with pytest.raises(ModelError, match="load the base and add the adapter"):
        Engine(model, tokenizer)


def test_keys_and_values_are_given_back_when_nothing_is_answered(start):
    engine = start()
    engine.generate(chats(4), max_new_tokens=4)
    for _ in range(300):
        if engine._cache.keys[0].numel() == 0:
            return
        time.sleep(0.02)
    pytest.fail("the memory was kept")


def test_a_window_whose_positions_depend_on_the_longest_is_not_exceeded():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 256, "rope_theta": 10000.0, **factors}
    original = {"original_max_position_embeddings": 256}  # Phi-3 says it in both places
    for arguments, window in (({"rope_parameters": scaling, **original}, 256), ({}, 512)):
        engine = Engine(tiny_model("phi3", **arguments), tiny_tokenizer())
        engine.close()
        assert engine.window == window


def test_a_refused_prompt_ends_those_that_were_taken_before_it(start):
    engine = start()
    with pytest.raises(EvaluationError, match="prompt 2 is empty"):
        engine.generate(["the cat", []], max_new_tokens=400)
    for _ in range(300):
        if engine.counts.finished:
            break
        time.sleep(0.02)
    assert engine.counts.finished == {"cancelled": 1}


@pytest.mark.parametrize("width", ["load_in_4bit", "load_in_8bit"])
def test_a_quantized_base_answers_with_adapters_as_it_does_offline(base_folder, adapter_folders, width):
    model, tokenizer = loaded(adapter_folders["a"], **{width: True})
    expected = generate_answers(model, tokenizer, chats(3), max_new_tokens=8, batch_size=1)
    engine = Engine(*loaded(base_folder, **{width: True}))
    try:
        engine.shelf.add("a", adapter_folders["a"])
        assert engine.generate(chats(3), adapters="a", max_new_tokens=8) == expected
        assert "trained on a base in full and is served on one in" in engine.shelf.get("a").notes[0]
    finally:
        engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_has_failed_says_why(start, monkeypatch):
    engine = start()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("nothing left")

    monkeypatch.setattr(engine.model, "forward", fail)
    parts: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    engine.submit(Request(ids("the cat"), max_new_tokens=4), parts.put)
    assert _end(parts) == "error"
    engine._thread.join()
    with pytest.raises(ServingError, match=r"the engine has failed: MemoryError\('nothing left'\)\. Start it again"):
        engine.submit(Request((1,)), print)
