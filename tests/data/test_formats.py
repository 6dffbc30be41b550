"""Schemas: what each row becomes, and the reason each unusable row is given."""

from __future__ import annotations

import json

import datasets
import pytest

from tunesmith.core.errors import DataError
from tunesmith.data.formats import detect_schema, text_goes_first, to_example
from tunesmith.data.types import Completion, Conversation, RowRefusedError, SourceRow, Text

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def understand(value, mapping=None):
    return to_example(SourceRow(value, "rows.jsonl:7"), mapping)


def refusal(value, mapping=None):
    with pytest.raises(RowRefusedError) as caught:
        understand(value, mapping)
    return caught.value


# --- schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, "messages", [SYSTEM, USER, ANSWER]),
        ({"messages": [USER, ANSWER], "text": "rendered", "id": 3}, "messages", [USER, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, "messages", [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "system": "Be brief"}, "messages", [SYSTEM, USER, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            "sharegpt",
            [USER, ANSWER],
        ),
        ({"conversations": [USER, ANSWER], "system": "Be brief"}, "sharegpt", [SYSTEM, USER, ANSWER]),
        ({"conversations": [USER, ANSWER], "system": ""}, "sharegpt", [USER, ANSWER]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "", "input": "Hi", "output": "Hello"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "Hi", "input": None, "output": "Hello", "text": "x"}, "alpaca", [USER, ANSWER]),
        (
            {"instruction": "Sum", "input": "1 2", "output": "3"},
            "alpaca",
            [{"role": "user", "content": "Sum\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        (
            {"instruction": "Hi", "output": "Hello", "system": "Be brief", "history": [["Hi", "Hello"]]},
            "alpaca",
            [SYSTEM, USER, ANSWER, USER, ANSWER],
        ),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt-completion", [USER, ANSWER]),
        ({"input": [SYSTEM, USER], "ideal": "Hello"}, "evals", [SYSTEM, USER, ANSWER]),
        ({"input": "Hi", "ideal": ["Hello", "Hey"]}, "evals", [USER, ANSWER]),
        ({"input": "Hi", "ideal": ANSWER}, "evals", [USER, ANSWER]),
    ],
)
def test_chat_schemas(value, schema, expected):
    example = understand(value)
    assert isinstance(example, Conversation)
    assert detect_schema(value) == example.schema == schema
    assert example.messages == expected
    assert example.where == "rows.jsonl:7"
    assert example.train == (None,) * len(expected)


def test_plain_completion_and_text():
    assert understand({"prompt": "2+2=", "completion": " 4"}) == Completion("2+2=", " 4", "rows.jsonl:7")
    assert understand({"text": " raw \n"}) == Text(" raw \n", "rows.jsonl:7")


@pytest.mark.parametrize(
    ("said", "role"),
    [("human", "user"), ("gpt", "assistant"), ("observation", "tool"), ("developer", "system"), ("tool", "tool")],
)
def test_role_names(said, role):
    rest = [USER, ANSWER]
    position = {"system": 0, "user": 0, "assistant": 1, "tool": 2}[role]
    turns = [*rest[:position], {"from": said, "value": "x"}, *rest[position:]]
    assert understand({"conversations": turns}).messages[position] == {"role": role, "content": "x"}


def test_text_parts_are_joined_and_null_fields_dropped():
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"],
        "name": None,
    }
    example = understand({"messages": [parts, {**ANSWER, "tool_calls": None, "name": "bot"}], "tools": None})
    assert example.messages == [{"role": "user", "content": "abc"}, {**ANSWER, "name": "bot"}]
    assert example.tools is None


@pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
def test_reasoning_is_given_under_both_names(key):
    answer = understand({"messages": [USER, {**ANSWER, key: "hm"}]}).messages[1]
    assert answer == {**ANSWER, "thinking": "hm", "reasoning_content": "hm", "reasoning": "hm"}


# --- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "add", "arguments": {"a": 1}},
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
    ],
)
def test_tool_calls_become_objects_with_parsed_arguments(call):
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        ANSWER,
    ]
    messages = understand({"messages": turns}).messages
    assert messages[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_tool_call_keeps_its_id_and_arguments_that_are_no_json():
    call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": "ls -l"}}
    assert understand({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).messages[1]["tool_calls"] == [
        call
    ]


def test_the_older_form_of_calls_and_tools():
    call = {"name": "add", "arguments": '{"a": 1}'}
    turns = [
        USER,
        {"role": "assistant", "content": "Wait", "function_call": call},
        {"role": "function", "content": "2"},
    ]
    example = understand({"messages": [*turns, ANSWER], "functions": [{"name": "add"}]})
    assert example.messages[1] == {"role": "assistant", "content": "Wait", "tool_calls": [CALL]}
    assert example.messages[2]["role"] == "tool"
    assert example.tools == [{"type": "function", "function": {"name": "add"}}]


def test_sharegpt_function_call():
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two"},
    ]
    example = understand({"conversations": turns, "tools": '[{"name": "add"}]'})
    assert example.messages[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.tools == [{"name": "add"}]


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"weight": 0, "train": False}, False),
        ({"weight": None}, None),
    ],
)
def test_message_flags_are_taken_out(flags, expected):
    example = understand({"messages": [USER, {**ANSWER, **flags}, USER, ANSWER]})
    assert example.train == (None, expected, None, None)
    assert example.messages[1] == ANSWER


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("input", "ideal")])
def test_answers_in_the_prompt_are_context_only(keys):
    prompt, completion = keys
    value = {prompt: [SYSTEM, USER, ANSWER, USER], completion: [ANSWER] if completion == "completion" else "Hello"}
    assert understand(value).train == (None, None, False, None, None)


def test_an_empty_answer_that_does_not_train_is_kept():
    assert understand({"messages": [USER, {"role": "assistant", "content": "", "weight": 0}, USER, ANSWER]})


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (
            {"mesages": [], "x": 1},
            "unknown schema",
            "has the keys 'mesages', 'x'. Accepted are messages; conversations;",
        ),
        ({"mesages": [], "x": 1}, "unknown schema", "Did you mean 'messages'?"),
        ({}, "unknown schema", "has the keys none"),
        ({"question": "a", "answer": "b"}, "unknown schema", "for example question=user, answer=assistant."),
        ({"messages": None}, "null content", "messages is null."),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "null content",
            "messages[1] (assistant) has no",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "null content", "no content and no tool_calls"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": []}]}, "null content", "no content and no tool_calls"),
        ({"instruction": "a", "input": "", "output": None, "text": "a"}, "null content", "output is null."),
        ({"input": [USER], "ideal": None}, "null content", "ideal is null."),
        ({"text": None}, "null content", "text is null."),
        ({"messages": []}, "no messages", "messages is an empty list."),
        ({"messages": [SYSTEM, USER]}, "no assistant turn", "only the roles system, user"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "no assistant turn", "completion has no assistant message"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty answer", "message 2 of 2"),
        ({"instruction": "a", "output": ""}, "empty answer", "message 2 of 2"),
        ({"prompt": "a", "completion": " "}, "empty answer", "the completion is empty."),
        ({"input": "a", "ideal": ""}, "empty answer", "message 2 of 2"),
        ({"text": " \n"}, "empty text", "the text is empty."),
        ({"messages": {"role": "user"}}, "wrong type", "must be a list of messages, not an object."),
        ({"messages": "hello"}, "wrong type", "messages is the text 'hello', which is not valid JSON."),
        ({"messages": ["hello"]}, "wrong type", "messages[0] must be an object with role and content, not text."),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "wrong type", "must be text, not a number."),
        ({"messages": [{"role": 1, "content": "a"}, ANSWER]}, "wrong type", "the role of messages[0] must be text"),
        ({"instruction": ["a"], "output": "b"}, "wrong type", "instruction must be text, not a list."),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "wrong type", "[question, answer] pairs."),
        ({"prompt": "a", "completion": [ANSWER]}, "wrong type", "prompt is text, completion is a list; both must be"),
        ({"input": "a", "ideal": 4}, "wrong type", "ideal must be text, not a number."),
        ({"text": True}, "wrong type", "text must be text, not true or false."),
        ({"messages": [{"content": "a"}, ANSWER]}, "message without role", "its keys are 'content'."),
        ({"messages": [{"role": "usr", "content": "a"}, ANSWER]}, "unknown role 'usr'", "Did you mean 'user'?"),
        ({"messages": [USER, SYSTEM, ANSWER]}, "system message not first", "message 2 of 3 is a system message"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "x"}, "two system messages", "begins with a system message"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "data": "x"}]}, ANSWER]},
            "content is not text",
            "part 0 of the content of messages[0] (user) is of type 'input_audio'; only text and images are read.",
        ),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "bad weight", "must be 0 or 1, not 0.5."),
        ({"messages": [USER, {**ANSWER, "weight": "1"}]}, "bad weight", "must be 0 or 1, not '1'."),
        ({"messages": [USER, {**ANSWER, "train": 1}]}, "bad train flag", "must be true or false, not 1."),
        (
            {"messages": [USER, {**ANSWER, "train": True, "weight": 0}]},
            "bad train flag",
            "says weight 0 and train True.",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"id": 1}]}]},
            "bad tool call",
            "messages[1].tool_calls[0] must be",
        ),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "bad tool call", "only an assistant message may."),
        (
            {"conversations": [{"from": "function_call", "value": "{"}]},
            "bad tool call",
            "'{', which is not valid JSON.",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [CALL], "function_call": CALL}]},
            "bad tool call",
            "say the same",
        ),
        ({"messages": [USER, ANSWER], "functions": ["nope"]}, "bad tools", "functions must be a list of objects"),
        ({"messages": [USER, ANSWER], "tools": [{}], "functions": [{}]}, "bad tools", "say the same"),
        ({"messages": [USER, ANSWER], "tools": "nope"}, "bad tools", "tools is the text 'nope'"),
        ({"messages": [USER, ANSWER], "tools": ["nope"]}, "bad tools", "must be a list of objects"),
        (
            {"messages": [USER, {**ANSWER, "thinking": "a", "reasoning_content": "b"}]},
            "two reasonings",
            "both reasoning_content and thinking, and they differ.",
        ),
        ({"messages": [USER, {**ANSWER, "thinking": 3}]}, "wrong type", "the reasoning of messages[1] must be text"),
        ({"text": "x\ud800"}, "not valid Unicode", "near 'x\\ud800' stands half of a surrogate pair"),
        ({"prompt": "\udfff", "completion": "a"}, "not valid Unicode", "surrogate"),
        ({"messages": [USER, {**ANSWER, "name": "\ud800"}]}, "not valid Unicode", "surrogate"),
    ],
)
def test_refusals(value, reason, detail):
    error = refusal(value)
    assert error.reason == reason
    assert detail in str(error)
    str(error).encode("utf-8")


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": [ANSWER], "rejected": [ANSWER], "messages": [USER, ANSWER]}, "preference"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
        ({"instruction": "a", "output": "b", "kto_tag": False}, "unpaired"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "stepwise"),
    ],
)
def test_preference_rows_are_recognised_and_refused(value, schema):
    assert detect_schema(value) == schema
    error = refusal(value)
    assert error.reason == f"{schema} rows"
    assert "not available yet" in str(error)


def test_deep_nesting_is_refused_without_recursion():
    deep: object = "x"
    for _ in range(5000):
        deep = [deep]
    call = {"name": "f", "arguments": {"a": deep}}
    assert refusal({"messages": [USER, {**ANSWER, "tool_calls": [call]}]}).reason == "nested too deeply"
    call = {"name": "f", "arguments": "[" * 100_000}
    assert refusal({"messages": [USER, {**ANSWER, "tool_calls": [call]}]}).reason == "nested too deeply"


# --- mapping ----------------------------------------------------------------------------------------------------------


def test_mapping_of_columns_to_roles():
    row = {"sys": "Be brief", "question": "Hi", "answer": "Hello", "messages": "ignored"}
    example = understand(row, {"question": "user", "answer": "assistant", "sys": "system"})
    assert example.messages == [SYSTEM, USER, ANSWER]
    assert example.schema == "columns"
    assert understand({**row, "sys": None}, {"sys": "system", "question": "user", "answer": "assistant"}).messages == [
        USER,
        ANSWER,
    ]


def test_columns_of_one_role_are_joined_in_the_order_of_the_mapping():
    example = understand({"c": "ctx", "q": "Hi", "a": "Hello"}, {"c": "user", "q": "user", "a": "assistant"})
    assert example.messages[0]["content"] == "ctx\n\nHi"
    example = understand({"c": " ", "q": "Hi", "a": "Hello"}, {"c": "user", "q": "user", "a": "assistant"})
    assert example.messages[0]["content"] == "Hi"


def test_empty_cells_of_a_table_are_nothing():
    row = {"instruction": "Hi", "output": "Hello", "input": "", "history": "", "image": "", "images": "", "system": ""}
    assert understand(row).messages == [USER, ANSWER]


def test_mapping_of_columns_to_fields():
    assert understand({"q": "a", "a": "b"}, {"q": "prompt", "a": "completion"}) == Completion("a", "b", "rows.jsonl:7")
    assert understand({"body": "x"}, {"body": "text"}) == Text("x", "rows.jsonl:7")
    chat = {"chat": [USER, ANSWER], "fns": [{"name": "f"}]}
    assert understand(chat, {"chat": "messages", "fns": "tools"}).tools == [{"name": "f"}]


def test_mapping_overrides_what_the_row_looks_like():
    row = {"chosen": "Hello", "rejected": "no", "prompt": "Hi"}
    assert understand(row, {"prompt": "user", "chosen": "assistant"}).messages == [USER, ANSWER]


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        ({"questoin": "a", "a": "b"}, "mapped column missing", "Did you mean 'questoin'?"),
        ({"question": None, "a": "b"}, "null content", "column 'question' is null."),
        ({"question": "a", "a": 1}, "wrong type", "column 'a' must be text, not a number."),
        ({"question": "a", "a": ""}, "empty answer", "message 2 of 2"),
    ],
)
def test_rows_that_do_not_fit_the_mapping(value, reason, detail):
    error = refusal(value, {"question": "user", "a": "assistant"})
    assert error.reason == reason
    assert detail in str(error)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({}, "the column mapping is empty"),
        ({"q": "usr", "a": "assistant"}, "is mapped to 'usr', which is not one of system, user, assistant"),
        ({"q": "usr", "a": "assistant"}, "Did you mean 'user'?"),
        ({"q": "user"}, "names no column for the assistant"),
        ({"q": "user", "a": "completion"}, "roles or fields, not both: 'user' or 'assistant' beside 'completion'"),
        ({"q": "prompt"}, "a mapping to prompt makes no whole row"),
        ({"q": "text", "t": "tools"}, "a mapping to text, tools makes no whole row"),
        ({"q": "text", "t": "text"}, "two columns are mapped to 'text'"),
        ({"q": "user", "a": "assistant", "t": "tools", "u": "tools"}, "two columns are mapped to 'tools'"),
    ],
)
def test_wrong_mappings_stop_everything(mapping, expected):
    with pytest.raises(DataError) as caught:
        understand({"q": "a", "a": "b", "t": "c", "u": "d"}, mapping)
    assert expected in str(caught.value)


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_train_flags_stay_with_their_messages_behind_a_system_column(field):
    row = {field: [USER, {**ANSWER, "train": False}, USER, {**ANSWER, "weight": 1}], "system": "Be brief"}
    example = to_example(SourceRow(row, "rows.jsonl:1"))
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert example.train == (None, None, False, None, True)


def test_a_text_column_goes_first_in_streams_and_sets_of_splits_too():
    rows = [{"instruction": "i", "output": "o", "text": "t"}]
    dataset = datasets.Dataset.from_list([{"instruction": "i", "output": "o"}])
    mapped = dataset.to_iterable_dataset().map(lambda row: {"text": "t"})
    assert mapped.column_names is None
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    assert text_goes_first(rows) and text_goes_first(mapped) and text_goes_first(whole)
    assert not text_goes_first(dataset) and not text_goes_first(iter(rows)) and not text_goes_first("rows.jsonl")
    assert not text_goes_first([{"messages": [], "text": "t"}])
