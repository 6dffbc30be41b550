"""A Modelfile's template makes the prompts that the tokenizer makes, or there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tests import tiny
from tests.export.go import render
from tests.export.tokenizers_of import TEMPLATES, with_template

from tunesmith.export.modelfile import Turns, go_template, modelfile, read_turns, rendered

_CHATS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Where is my order?"),),
    (("user", "One."), ("assistant", "Two.\n\nThree."), ("user", "{{ four }} <five>")),
    (("system", "You sell shoes.\nBe brief."), ("user", "Hello?")),
    (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")),
)
CHATS = [[{"role": role, "content": content} for role, content in chat] for chat in _CHATS]


def theirs(tokenizer: Any, chat: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_makes_the_prompts_of_the_tokenizer(name: str) -> None:
    tokenizer = with_template(name)
    turns = read_turns(tokenizer)
    assert isinstance(turns, Turns), turns
    template = go_template(turns)
    for chat in CHATS:
        assert render(template, chat) == rendered(turns, chat) == theirs(tokenizer, chat)


def test_what_the_runtime_puts_before_a_prompt_is_left_out() -> None:
    tokenizer = with_template("llama-3")
    text = modelfile(["a.Q8_0.gguf", "a.F16.gguf"], read_turns(tokenizer), bos="<s>", stops=["<|eot_id|>", 'a"b'])
    lines = text.splitlines()
    assert lines[0] == "FROM ./a.Q8_0.gguf" and lines[-1] == 'PARAMETER stop "<|eot_id|>"'
    assert "# FROM ./a.F16.gguf" in lines and 'a"b' not in text
    template = text.partition('TEMPLATE """')[2].partition('"""')[0]
    assert "<s>" + render(template, CHATS[1]) == theirs(tokenizer, CHATS[1])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("{{ strftime_now('%d') }}{{ messages[0].content }}", "writes the date"),
        ("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}", "more than a fixed text"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}", "plain conversation"),
        ("{% for m in messages %}{{ raise_exception('') if m.role != 'user' }}{{ m.content }}{% endfor %}", "refuses"),
        ("{% for m in messages %}{{ '{{' }}{{ m.role }}: {{ m.content }}\n{% endfor %}", "mean something else"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_left_out_with_the_reason(template: str | None, reason: str) -> None:
    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    tokenizer.chat_template = template
    found = read_turns(tokenizer)
    assert isinstance(found, str) and reason in found
    text = modelfile(["a.gguf"], found, bos=None, stops=[])
    assert text == f"FROM ./a.gguf\n# No TEMPLATE: {found}. Ollama reads the one in the file.\n"


def test_a_template_that_forgets_an_old_turn_is_left_out() -> None:
    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 != 1 or messages | length < 5 %}<{{ m.role }}>{{ m.content }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert read_turns(tokenizer) == "the chat template writes more than a fixed text around each message"
