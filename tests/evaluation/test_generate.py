"""Batched answers equal answers made one at a time, in the order asked, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch

from tunesmith.core.errors import EvaluationError, ModelError
from tunesmith.evaluation.generate import generate_answers
from tunesmith.models.prompts import encode_prompt, stop_token_ids

PROMPTS = ["one", "a much longer prompt than the others have", "x", "the quick brown fox", "12 34", "Hello there, you"]


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]


def plain_greedy(model, tokenizer, ids: list[int], count: int) -> str:
    """Continue ``ids`` by the likeliest token, without cache, padding or anything of ``generate``."""
    stops, start = set(stop_token_ids(model, tokenizer)), len(ids)
    with torch.no_grad():
        while len(ids) - start < count:
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] in stops:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_batched_answers_equal_a_plain_greedy_loop_and_keep_their_order(model, tokenizer, batch_size):
    model.eval()
    expected = [plain_greedy(model, tokenizer, encode_prompt(tokenizer, prompt), 12) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)  # else the order would not be seen
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected


def test_chat_prompts_go_through_the_template_with_the_answer_opened(model, tokenizer):
    model.eval()
    ids = encode_prompt(tokenizer, chat("Hi"))
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = [plain_greedy(model, tokenizer, encode_prompt(tokenizer, chat(text)), 8) for text in PROMPTS]
    assert generate_answers(model, tokenizer, [chat(text) for text in PROMPTS], max_new_tokens=8) == expected


def test_token_ids_are_taken_as_they_are(model, tokenizer):
    ids = encode_prompt(tokenizer, "one")
    assert encode_prompt(tokenizer, ids) == ids
    by_ids, by_text = (generate_answers(model, tokenizer, [prompt], max_new_tokens=6) for prompt in (ids, "one"))
    assert by_ids == by_text


def test_token_ids_of_numpy_and_torch_are_ids_too(model, tokenizer):
    import numpy
    import torch

    ids = encode_prompt(tokenizer, "one")
    for kind in (numpy.array, torch.tensor):
        assert encode_prompt(tokenizer, kind(ids)) == ids


def test_a_peft_model_answers_with_its_adapter(adapted, tokenizer):
    adapted.eval()
    expected = [plain_greedy(adapted, tokenizer, encode_prompt(tokenizer, prompt), 10) for prompt in PROMPTS]
    assert generate_answers(adapted, tokenizer, PROMPTS, max_new_tokens=10, batch_size=3) == expected
    with adapted.disable_adapter():
        assert generate_answers(adapted, tokenizer, PROMPTS, max_new_tokens=10, batch_size=3) != expected


def test_dropout_mode_cache_flag_and_padding_side_are_restored(adapted, tokenizer):
    adapted.train()
    adapted.base_model.model.model.layers[0].eval()  # a frozen part, which must not be switched to training
    before = {name: module.training for name, module in adapted.named_modules()}
    adapted.config.use_cache = False
    tokenizer.padding_side = "right"
    first, second = (generate_answers(adapted, tokenizer, PROMPTS, max_new_tokens=6, seed=seed) for seed in (1, 2))
    assert first == second  # dropout was off, so the seed did not matter
    assert {name: module.training for name, module in adapted.named_modules()} == before
    assert adapted.config.use_cache is False
    assert tokenizer.padding_side == "right"
    assert adapted.generation_config.do_sample is not True


def test_the_mode_is_restored_after_an_error(model, tokenizer):
    model.train()

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_answers(model, tokenizer, ["a"], max_new_tokens=2, progress=fail)
    assert model.training


def test_an_answer_ends_at_any_of_the_models_end_tokens(model, tokenizer):
    free = generate_answers(model, tokenizer, ["one"], max_new_tokens=12)[0]
    second = tokenizer(free, add_special_tokens=False)["input_ids"][1]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, second]
    cut = generate_answers(model, tokenizer, ["one", *PROMPTS], max_new_tokens=12)
    model.eval()
    assert cut[0] == plain_greedy(model, tokenizer, encode_prompt(tokenizer, "one"), 12)
    assert len(cut[0]) < len(free)


def test_the_end_of_turn_of_the_template_ends_an_answer_though_it_is_not_eos(model, tokenizer):
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(model, tokenizer) == sorted({tokenizer.eos_token_id, end_of_turn})
    with torch.no_grad():  # after any text, the end of turn is the likeliest token
        model.lm_head.weight[end_of_turn] = 0
        hidden = model.model(torch.tensor([encode_prompt(tokenizer, chat("Hi"))])).last_hidden_state[0, -1]
        model.lm_head.weight[end_of_turn] = 100 * hidden
    assert generate_answers(model, tokenizer, [chat("Hi")], max_new_tokens=12) == [""]


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(model, tokenizer):
    free = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12)
    stops = [free[0][3:5], free[3][6:8]]
    stopped = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12, stop=stops)
    for long, short in zip(free, stopped, strict=True):
        ends = [long.find(text) for text in stops if text in long]
        assert short == (long[: min(ends)] if ends else long)
    assert stopped != free


def test_generation_stops_with_the_stop_string_of_the_last_row(model, tokenizer):
    free = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0]
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    hook = model.lm_head.register_forward_hook(count)
    generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=12, stop=free[:2])
    hook.remove()
    assert calls == 2  # bytes: two tokens make the string, ten more were allowed


def test_a_stop_string_in_the_prompt_does_not_end_the_answer(model, tokenizer):
    assert generate_answers(model, tokenizer, ["STOP STOP"], max_new_tokens=5, stop="STOP") == generate_answers(
        model, tokenizer, ["STOP STOP"], max_new_tokens=5
    )


def test_sampling_depends_on_the_seed_alone_and_leaves_torchs_generator(model, tokenizer):
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def sample(seed: int, **settings) -> list[str]:
        return generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=2.0, seed=seed, **settings)

    first = sample(1)
    torch.rand(3)
    assert sample(1) == first != sample(2)
    torch.set_rng_state(state)
    sample(3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_sampling_from_the_likeliest_token_alone_is_greedy(model, tokenizer, narrow):
    greedy = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=2.0, **narrow) == greedy


def test_sampling_defaults_of_the_model_do_not_apply(model, tokenizer):
    greedy = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8)
    sampled = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=2.0)
    for name, value in {"do_sample": True, "temperature": 9.0, "top_k": 1, "min_p": 1.0, "top_p": 0.1}.items():
        setattr(model.generation_config, name, value)
    model.generation_config.repetition_penalty = 50.0
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8) == greedy
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=2.0) == sampled


def test_repetition_penalty_has_an_effect(model, tokenizer):
    plain = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=20)
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=20, repetition_penalty=5.0) != plain


def test_progress_counts_the_answers(model, tokenizer):
    seen: list[tuple[int, int]] = []
    generate_answers(
        model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=4, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(4, 6), (6, 6)]


def test_no_prompts_give_no_answers(model, tokenizer):
    assert generate_answers(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1, "top_p": 0}, r"temperature=-1 must be 0 \(greedy\) or more; top_p=0 must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 512}, "max_new_tokens=512 must be below the model's 512 positions"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 2}, "min_p=2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"stop": ["a", ""]}, "empty string"),
    ],
)
def test_settings_out_of_range_are_refused(model, tokenizer, settings, message):
    with pytest.raises(EvaluationError, match=message):
        generate_answers(model, tokenizer, ["a"], **settings)


def test_a_prompt_that_leaves_no_room_is_refused(model, tokenizer):
    window = model.config.max_position_embeddings
    ids = [5] * (window - 3)
    assert len(generate_answers(model, tokenizer, [ids], max_new_tokens=3)) == 1
    with pytest.raises(EvaluationError, match=f"prompt 2 has {window - 3} tokens and leaves no room for 4"):
        generate_answers(model, tokenizer, ["a", ids], max_new_tokens=4)


def test_an_empty_prompt_is_refused(model, tokenizer):
    with pytest.raises(EvaluationError, match="prompt 2 is empty"):
        generate_answers(model, tokenizer, ["a", ""])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("Hi", "prompts is a text; give a list"),
        (chat("Hi"), "prompts is one conversation; give a list"),
        (["a", [5, 10**6]], "prompt 2 has a token that is not there: the model knows 0 to"),
        ([[-1]], "prompt 1 has a token that is not there"),
    ],
    ids=str,
)
def test_what_is_no_list_of_prompts_is_refused(model, tokenizer, prompts, message):
    with pytest.raises(EvaluationError, match=message):
        generate_answers(model, tokenizer, prompts, max_new_tokens=2)


def test_a_prompt_that_the_template_refuses(model, tokenizer, monkeypatch):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    with pytest.raises(EvaluationError, match=r"prompt 2 cannot be answered: .*refuses.*no system role"):
        generate_answers(model, tokenizer, ["a", chat("Hi")])


def test_messages_without_a_chat_template_are_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ModelError, match="chat_template="):
        generate_answers(model, tokenizer, [chat("Hi")])
    assert stop_token_ids(model, tokenizer) == [tokenizer.eos_token_id]


def test_fast_generate_is_generate_and_says_what_needs_vllm(model):
    from tunesmith.core.errors import NotSupportedYetError
    from tunesmith.evaluation.fast import with_fast_generate

    model.eval()
    ids = torch.tensor([[5, 6, 7]])
    fast = with_fast_generate(model).fast_generate
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(fast(ids, max_new_tokens=4, do_sample=False), expected)
    assert torch.equal(fast(input_ids=ids, max_new_tokens=4, do_sample=False), expected)
    for call in ({"inputs": ["a text"]}, {"inputs": ids, "sampling_params": 1}, {"inputs": ids, "lora_request": 1}):
        with pytest.raises(NotSupportedYetError, match="only where vLLM generates"):
            fast(**call)


def test_the_end_that_some_tokenizers_put_behind_a_text_is_no_part_of_a_prompt(tokenizer):
    import copy

    from tokenizers import processors

    ending, end = copy.deepcopy(tokenizer), (tokenizer.eos_token, tokenizer.eos_token_id)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    assert ending("one")["input_ids"][-1] == tokenizer.eos_token_id
    bare = tokenizer("one", add_special_tokens=False)["input_ids"]
    assert encode_prompt(ending, "one") == bare
    assert encode_prompt(tokenizer, f"one{tokenizer.eos_token}") == [*bare, tokenizer.eos_token_id]
