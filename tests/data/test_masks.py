"""Masks: trained tokens are exactly the answers and their end of turn, or the row is refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.data.masks import CUT_TOKEN, DROPS_MESSAGE, NO_EOS, SPLIT_BY_TURN, ExampleEncoder
from tunesmith.data.turns import DROPS_TEXT, NO_END_OF_TURN, PROMPT_DIFFERS
from tunesmith.data.types import Completion, Conversation, RowRefusedError, Text

from .chat_families import FAMILIES, template_text
from .conversations import TOOLS, random_conversation
from .oracle import expected_documents

CONVERSATIONS = 80
WITHOUT_SYSTEM = {"gemma-original"}
WITH_TOOLS = ["chatml", "llama-3", "mistral", "mistral-pieces", "qwen3", "gpt-oss"]
NO_END_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"

USER = {"role": "user", "content": "Hi there"}
ANSWER = {"role": "assistant", "content": "Hello you"}


def conversation(messages, train=None, tools=None) -> Conversation:
    return Conversation(messages, tuple(train or [None] * len(messages)), "rows.jsonl:3", "messages", tools)


def refusal(encoder, example) -> RowRefusedError:
    with pytest.raises(RowRefusedError) as caught:
        encoder.encode(example)
    return caught.value


def trained_text(tokenizer, document) -> str:
    return tokenizer.decode(document.input_ids[document.trained], clean_up_tokenization_spaces=False)


def assert_as_expected(documents, expected) -> None:
    assert len(documents) == len(expected)
    for document, (ids, trained, ends) in zip(documents, expected, strict=True):
        assert document.input_ids.tolist() == ids
        assert np.flatnonzero(document.trained).tolist() == np.flatnonzero(trained).tolist()
        assert document.end_of_turn == ends
        assert document.input_ids.dtype == np.int32 and document.trained.dtype == np.bool_


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tokens_are_exactly_the_answers_and_their_end(chat_tokenizer, family):
    tokenizer = chat_tokenizer(family)
    encoder = ExampleEncoder(tokenizer)
    for seed in range(CONVERSATIONS):
        messages = random_conversation(seed, system=family not in WITHOUT_SYSTEM)
        assert_as_expected(encoder.encode(conversation(messages)), expected_documents(tokenizer, family, messages))


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_trained_tokens_are_exact_with_tools(chat_tokenizer, family):
    tokenizer = chat_tokenizer(family)
    encoder = ExampleEncoder(tokenizer)
    for seed in range(CONVERSATIONS // 2):
        messages = random_conversation(seed, tools=True)
        documents = encoder.encode(conversation(messages, tools=TOOLS))
        assert_as_expected(documents, expected_documents(tokenizer, family, messages, TOOLS))
        assert DROPS_MESSAGE not in documents[0].notes


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama-3-original"])
def test_an_answer_is_trained_behind_its_inference_prompt(chat_tokenizer, family):
    """Training text = inference prompt + answer, token for token, unless a note says that it is not."""
    encoder = ExampleEncoder(chat_tokenizer(family))
    for seed in range(CONVERSATIONS // 4):
        example = conversation(random_conversation(seed, system=family not in WITHOUT_SYSTEM))
        notes = {note for document in encoder.encode(example) for note in document.notes}
        assert bool(encoder.check_inference_agreement(example)) == bool(notes & {CUT_TOKEN, PROMPT_DIFFERS})
        assert (PROMPT_DIFFERS in notes) == (family == "deepseek-r1")


# --- what is trained of a conversation --------------------------------------------------------------------------------


def test_qwen3_trains_the_think_block_that_the_model_writes_itself(chat_tokenizer):
    tokenizer = chat_tokenizer("qwen3")
    (document,) = ExampleEncoder(tokenizer).encode(conversation([USER, ANSWER]))
    assert trained_text(tokenizer, document) == "<think>\n\n</think>\n\nHello you<|im_end|>"
    assert document.notes == ()


def test_templates_that_drop_older_reasoning_keep_it_in_each_turns_own_document(chat_tokenizer):
    tokenizer = chat_tokenizer("qwen3")
    thought = {**ANSWER, "reasoning_content": "a plan"}
    documents = ExampleEncoder(tokenizer).encode(conversation([USER, thought, USER, thought]))
    assert [trained_text(tokenizer, d) for d in documents] == ["<think>\na plan\n</think>\n\nHello you<|im_end|>"] * 2
    assert all(document.notes == (SPLIT_BY_TURN,) for document in documents)


def test_gpt_oss_trains_channels_and_closes_with_the_right_token(chat_tokenizer):
    tokenizer = chat_tokenizer("gpt-oss")
    thought = {**ANSWER, "thinking": "a plan"}
    (document,) = ExampleEncoder(tokenizer).encode(conversation([USER, thought]))
    assert trained_text(tokenizer, document) == (
        "<|channel|>analysis<|message|>a plan<|end|><|start|>assistant<|channel|>final<|message|>Hello you<|return|>"
    )
    call = {"type": "function", "function": {"name": "time", "arguments": {}}}
    calling = {"role": "assistant", "content": "I need the time", "tool_calls": [call]}
    (document,) = ExampleEncoder(tokenizer).encode(conversation([USER, calling], tools=TOOLS))
    assert trained_text(tokenizer, document).startswith("<|channel|>analysis<|message|>I need the time<|end|>")
    assert trained_text(tokenizer, document).endswith("{}<|call|>")


def test_phi3_closes_an_answer_with_end_not_with_the_text_end_behind_it(chat_tokenizer):
    tokenizer = chat_tokenizer("phi-3")
    (document,) = ExampleEncoder(tokenizer).encode(conversation([USER, ANSWER, USER, {**ANSWER, "content": "  Yes"}]))
    assert tokenizer.convert_ids_to_tokens(document.input_ids[-1:]) == ["<|endoftext|>"]
    assert not document.trained[-1]
    ends = tokenizer.convert_ids_to_tokens(document.input_ids[list(document.end_of_turn)])
    assert ends == ["<|end|>", "<|end|>"]
    header = tokenizer.convert_tokens_to_ids("<|assistant|>")  # it swallows the answer's leading space
    assert not document.trained[document.input_ids == header].any()


def test_deepseek_notes_reasoning_that_its_template_drops(chat_tokenizer):
    tokenizer = chat_tokenizer("deepseek-r1")
    reasoned = {"role": "assistant", "content": "<think>\na plan\n</think>\n\nHello you"}
    (document,) = ExampleEncoder(tokenizer).encode(conversation([USER, reasoned]))
    assert trained_text(tokenizer, document) == "\n\nHello you<｜end▁of▁sentence｜>"
    assert set(document.notes) == {PROMPT_DIFFERS, DROPS_TEXT}


def test_special_tokens_in_a_row_close_an_answer_together(chat_tokenizer):
    """As Cohere's do: content, end of response, end of turn."""
    tokenizer = chat_tokenizer("gpt-oss")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|><|return|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
    )
    (document,) = ExampleEncoder(tokenizer).encode(conversation([USER, ANSWER, USER, ANSWER]))
    assert trained_text(tokenizer, document) == "Hello you<|end|><|return|>" * 2
    closing = tokenizer.convert_ids_to_tokens(document.input_ids[list(document.end_of_turn)])
    assert closing == ["<|return|>", "<|return|>"]


def test_last_trains_only_the_last_answer(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    messages = [USER, ANSWER, USER, {"role": "assistant", "content": "Bye"}, USER]
    (document,) = ExampleEncoder(tokenizer, train_on="last").encode(conversation(messages))
    assert trained_text(tokenizer, document) == "Bye<|im_end|>"
    assert len(document.end_of_turn) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_all_trains_every_token_but_the_first_and_knows_the_ends(chat_tokenizer, family):
    tokenizer = chat_tokenizer(family)
    encoder = ExampleEncoder(tokenizer, train_on="all")
    example = conversation([USER, ANSWER, USER, {"role": "assistant", "content": "Bye"}, USER])
    (document,) = encoder.encode(example)
    assert not document.trained[0] and document.trained[1:].all()
    assert document.input_ids.tolist() == tokenizer(encoder.render(example), add_special_tokens=False)["input_ids"]
    closing = tokenizer.convert_ids_to_tokens(document.input_ids[list(document.end_of_turn)])
    assert len(closing) == 2 and set(closing) < set(FAMILIES[family].special)


def test_train_flags_go_before_train_on(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    messages = [{"role": "system", "content": "Be kind"}, USER, ANSWER, USER, {"role": "assistant", "content": "Bye"}]
    flags = [True, None, False, True, None]
    (document,) = ExampleEncoder(tokenizer).encode(conversation(messages, flags))
    assert trained_text(tokenizer, document) == "Be kindHi thereBye<|im_end|>"
    assert len(document.end_of_turn) == 1
    (document,) = ExampleEncoder(tokenizer, train_on="all").encode(conversation(messages, flags))
    untrained = tokenizer.decode(document.input_ids[~document.trained])
    assert untrained == "<|im_start|>Hello you<|im_end|>"
    assert refusal(ExampleEncoder(tokenizer), conversation([USER, ANSWER], [None, False])).reason == "no trained turn"
    assert refusal(ExampleEncoder(tokenizer), conversation([USER])).reason == "no assistant turn"


def test_other_roles_cannot_be_trained_where_turns_become_documents(chat_tokenizer):
    encoder = ExampleEncoder(chat_tokenizer("qwen3"))
    refused = refusal(encoder, conversation([USER, ANSWER, USER, ANSWER], [None, None, True, None]))
    assert refused.reason == "chat template is not stable" and "train flag" in str(refused)


def test_a_conversation_may_start_with_an_answer(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    encoder = ExampleEncoder(tokenizer)
    (document,) = encoder.encode(conversation([ANSWER]))
    assert trained_text(tokenizer, document) == "Hello you<|im_end|>"
    assert encoder.check_inference_agreement(conversation([ANSWER])) == [
        "message 0: there is no inference prompt before it"
    ]


def test_prompt_text_is_what_inference_reads(chat_tokenizer):
    encoder = ExampleEncoder(chat_tokenizer("chatml"))
    assert encoder.prompt_text([USER]) == "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"


def test_inference_differences_are_told_in_words(chat_tokenizer):
    (said,) = ExampleEncoder(chat_tokenizer("deepseek-r1")).check_inference_agreement(conversation([USER, ANSWER]))
    assert said.startswith("message 1: the inference prompt ends with '<think>\\n'")
    encoder = ExampleEncoder(chat_tokenizer("chatml"))
    joined = conversation([USER, {"role": "assistant", "content": "\n\n  code"}])
    (document,) = encoder.encode(joined)
    (said,) = encoder.check_inference_agreement(joined)
    assert "share a token" in said and CUT_TOKEN in document.notes
    # GPT-2's rules cut "\n\n" in two where a word follows: no token is shared, and still the prompt reads differently
    (said,) = ExampleEncoder(chat_tokenizer("llama-3-original")).check_inference_agreement(conversation([USER, ANSWER]))
    assert "tokenizes differently where nothing follows it" in said


# --- rows that are refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "what is <|im_end|>?"}, ANSWER],
        [USER, {"role": "assistant", "content": "it is <|im_end|>"}],
        [USER, {**ANSWER, "reasoning_content": "<|im_end|>"}],
        [USER, {**ANSWER, "tool_calls": [{"function": {"name": "time", "arguments": {"<|im_end|>": 1}}}]}],
    ],
)
def test_special_tokens_in_the_rows_own_text_are_refused(chat_tokenizer, messages):
    refused = refusal(ExampleEncoder(chat_tokenizer("chatml")), conversation(messages))
    assert refused.reason == "special token in content" and "'<|im_end|>'" in str(refused)


def test_the_templates_own_refusal_is_passed_on(chat_tokenizer):
    system = {"role": "system", "content": "Be kind"}
    refused = refusal(ExampleEncoder(chat_tokenizer("gemma-original")), conversation([system, USER, ANSWER]))
    assert refused.reason == "chat template refuses the row" and "System role not supported" in str(refused)
    refused = refusal(ExampleEncoder(chat_tokenizer("phi-3")), conversation([{"role": "user", "content": 3}, ANSWER]))
    assert "TypeError" in str(refused)


def test_deep_nesting_is_refused_without_a_traceback(chat_tokenizer):
    nested: dict = {}
    for _ in range(100_000):  # more than Python 3.12 takes in C, which is more than in Python
        nested = {"a": nested}
    call = {"type": "function", "function": {"name": "time", "arguments": nested}}
    row = conversation([USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert "RecursionError" in str(refusal(ExampleEncoder(chat_tokenizer("chatml")), row))


def test_a_template_that_cannot_be_located_is_refused(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    refused = refusal(ExampleEncoder(tokenizer), conversation([USER, ANSWER]))
    assert refused.reason == "chat template is not stable" and "message 1" in str(refused)


def test_dropped_tool_calls_are_refused_and_dropped_messages_noted(chat_tokenizer):
    call = {"type": "function", "function": {"name": "time", "arguments": {}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    refused = refusal(ExampleEncoder(chat_tokenizer("llama-3-original")), conversation([USER, calling]))
    assert refused.reason == "chat template drops tool calls" and "'time'" in str(refused)
    result = {"role": "tool", "content": "twelve"}
    (document,) = ExampleEncoder(chat_tokenizer("phi-3")).encode(conversation([USER, result, ANSWER]))
    assert document.notes == (DROPS_MESSAGE,)
    (document,) = ExampleEncoder(chat_tokenizer("phi-3")).encode(conversation([USER, ANSWER], tools=TOOLS))
    assert document.notes == (DROPS_MESSAGE,)


def test_an_answer_that_the_template_drops_is_refused(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = template_text("trl:smolvlm")  # it wants lists of parts and passes over plain text
    assert refusal(ExampleEncoder(tokenizer), conversation([USER, ANSWER])).reason == "chat template drops the answer"


def test_a_think_block_that_prompt_and_answer_open_differently_is_not_trained(chat_tokenizer):
    """Nemotron: the prompt ends with "<think>\\n", the rendered answer starts with "<think></think>"."""
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.chat_template = template_text("trl:nemotron_3_nano")
    documents = ExampleEncoder(tokenizer).encode(conversation([USER, ANSWER, USER, ANSWER]))
    for document in documents:
        assert set(trained_text(tokenizer, document).split("<|im_end|>")) == {"Hello you", ""}
        assert PROMPT_DIFFERS in document.notes


def test_half_a_surrogate_pair_is_refused(chat_tokenizer):
    row = conversation([USER, {"role": "assistant", "content": "x\ud83d"}])
    refused = refusal(ExampleEncoder(chat_tokenizer("chatml")), row)
    assert refused.reason == "invalid Unicode" and "\\ud83d" in str(refused)


def test_a_conversation_of_thousands_of_messages_is_refused_at_once(chat_tokenizer):
    refused = refusal(ExampleEncoder(chat_tokenizer("chatml")), conversation([USER, ANSWER] * 501))
    assert refused.reason == "too many messages" and "1,002" in str(refused)


def test_a_template_without_end_of_turn_is_noted(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = NO_END_TEMPLATE
    (document,) = ExampleEncoder(tokenizer).encode(conversation([USER, ANSWER]))
    assert document.notes == (NO_END_OF_TURN,) and document.end_of_turn == ()
    assert trained_text(tokenizer, document).endswith("Hello you")


def test_conversations_need_a_chat_template(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"chat_template= .*chatml, llama-3, gemma, mistral"):
        ExampleEncoder(tokenizer).encode(conversation([USER, ANSWER]))
    (document,) = ExampleEncoder(tokenizer, chat_template="chatml").encode(conversation([USER, ANSWER]))
    assert trained_text(tokenizer, document) == "Hello you<|im_end|>"


def test_train_on_is_checked(chat_tokenizer):
    with pytest.raises(SettingsError, match=r"train_on='asistant' is none of .*Did you mean 'assistant'\?"):
        ExampleEncoder(chat_tokenizer("chatml"), train_on="asistant")
    with pytest.raises(SettingsError, match="'assistant' or 'last' goes with markers"):
        ExampleEncoder(chat_tokenizer("chatml"), train_on="all", instruction_part="Q:", response_part="A:")


def test_slow_tokenizers_are_refused():
    with pytest.raises(ModelError, match="ByT5Tokenizer is a slow tokenizer"):
        ExampleEncoder(ByT5Tokenizer())


# --- text and completions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-3", "mistral", "mistral-pieces", "deepseek-r1"])
def test_plain_text_has_one_bos_and_one_eos(chat_tokenizer, family):
    tokenizer = chat_tokenizer(family)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    encoder = ExampleEncoder(tokenizer)
    (plain,) = encoder.encode(Text("Hello you", "x"))
    assert plain.input_ids[:-1].tolist() == tokenizer("Hello you")["input_ids"]
    for text in ("Hello you", f"{bos}Hello you", f"Hello you{eos}", f"{bos}Hello you{eos}\n"):
        (document,) = encoder.encode(Text(text, "x"))
        ids = document.input_ids.tolist()
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        assert not document.trained[0] and document.trained[1:].all()


def test_no_bos_is_invented(chat_tokenizer):
    """The tokenizer has a BOS token, <|im_start|>, but does not put it before text: neither do we."""
    tokenizer = chat_tokenizer("chatml")
    (document,) = ExampleEncoder(tokenizer).encode(Text("Hello you", "x"))
    assert tokenizer.decode(document.input_ids) == "Hello you<|im_end|>"


@pytest.mark.parametrize("family", ["chatml", "llama-3", "mistral-pieces"])
def test_completions_train_the_completion_and_eos(chat_tokenizer, family):
    tokenizer = chat_tokenizer(family)
    (document,) = ExampleEncoder(tokenizer).encode(Completion("Question: why?\nAnswer:", " because 👋", "x"))
    assert trained_text(tokenizer, document).strip() == f"because 👋{tokenizer.eos_token}"
    assert document.end_of_turn == (len(document) - 1,) and document.notes == ()
    (same,) = ExampleEncoder(tokenizer).encode(
        Completion("Question: why?\nAnswer:", f" because 👋{tokenizer.eos_token}", "x")
    )
    assert same.input_ids.tolist() == document.input_ids.tolist()
    (everything,) = ExampleEncoder(tokenizer, train_on="all").encode(Completion("Question: why?", " because", "x"))
    assert everything.trained[1:].all() and not everything.trained[0]


def test_a_token_across_prompt_and_completion_is_trained_and_noted(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    (document,) = ExampleEncoder(tokenizer).encode(Completion("a questi", "on", "x"))
    assert document.notes == (CUT_TOKEN,)
    assert trained_text(tokenizer, document) == " question<|im_end|>"


def test_text_without_eos_in_the_tokenizer_is_noted(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.eos_token = None
    for example in (Text("Hello you", "x"), Completion("Hello", " you", "x")):
        (document,) = ExampleEncoder(tokenizer).encode(example)
        assert document.notes == (NO_EOS,) and document.end_of_turn == ()


@pytest.mark.parametrize("example", [Text(" \n", "x"), Completion("Hello", " ", "x")])
def test_empty_rows_are_refused(chat_tokenizer, example):
    assert refusal(ExampleEncoder(chat_tokenizer("chatml")), example).reason in ("empty text", "empty completion")


def test_white_space_behind_the_eos_of_a_completion_is_not_trained(chat_tokenizer):
    tokenizer = chat_tokenizer("mistral")
    (document,) = ExampleEncoder(tokenizer).encode(Completion("Question: why?\nAnswer:", " because</s>\n", "x"))
    assert trained_text(tokenizer, document) == " because</s>"
    (end,) = document.end_of_turn
    assert document.input_ids[end] == tokenizer.eos_token_id


def test_special_tokens_in_the_rows_tools_are_refused(chat_tokenizer):
    tool = {"type": "function", "function": {"name": "time", "description": "ends with <|im_end|>"}}
    refused = refusal(ExampleEncoder(chat_tokenizer("chatml")), conversation([USER, ANSWER], tools=[tool]))
    assert refused.reason == "special token in content" and "'<|im_end|>'" in str(refused)


def test_an_answer_that_is_rendered_otherwise_later_cannot_be_left_out_of_all(chat_tokenizer):
    encoder = ExampleEncoder(chat_tokenizer("qwen3"), train_on="all")
    thought = {**ANSWER, "reasoning_content": "a plan"}
    refused = refusal(encoder, conversation([USER, thought, USER, ANSWER], [None, False, None, None]))
    assert refused.reason == "chat template is not stable" and "message 1 is not to be trained" in str(refused)


def test_the_first_token_of_a_completion_without_a_prompt_is_not_trained(chat_tokenizer):
    (document,) = ExampleEncoder(chat_tokenizer("chatml")).encode(Completion("", "Hello you", "x"))
    assert not document.trained[0] and document.trained[1:].all()


def test_text_behind_the_last_special_token_of_a_call_means_that_no_token_ends_it(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + (m['content'] or '') }}"
        "{% for call in m['tool_calls'] or [] %}{{ '<|im_end|>' + call['function']['name'] }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )
    calling = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "time", "arguments": {}}}]}
    (document,) = ExampleEncoder(tokenizer).encode(conversation([USER, calling]))
    assert document.notes == (NO_END_OF_TURN,) and document.end_of_turn == ()
    assert trained_text(tokenizer, document) == "<|im_end|>time"


def test_reasoning_that_the_template_drops_is_noted(chat_tokenizer):
    thought = {**ANSWER, "reasoning_content": "a plan"}
    (document,) = ExampleEncoder(chat_tokenizer("chatml")).encode(conversation([USER, thought]))
    assert document.notes == (DROPS_TEXT,)
