"""Built-in chat templates: what they render, which tokenizers they fit, and how wrong names are answered."""

from __future__ import annotations

import logging

import pytest

from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.data.markers import derive_markers
from tunesmith.data.masks import ExampleEncoder
from tunesmith.data.templates import BUILT_IN_TEMPLATES, apply_template, get_template
from tunesmith.data.types import Conversation, RowRefusedError

from .chat_families import template_text
from .conversations import TOOLS, random_conversation

TURNS = [
    {"role": "system", "content": "Be kind"},
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "abcdefghi", "function": {"name": "time", "arguments": {"place": "é"}}}],
}
RESULT = {"role": "tool", "content": '"noon"', "tool_call_id": "abcdefghi"}


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe kind\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    ),
    "mistral": "<s>[INST] Be kind\n\nHi[/INST] Hello</s>[INST] Bye[/INST]",
}


@pytest.mark.parametrize("family", BUILT_IN_TEMPLATES)
def test_what_each_template_renders(chat_tokenizer, family):
    assert render(chat_tokenizer(family), TURNS, add_generation_prompt=True) == RENDERED[family]


@pytest.mark.parametrize(("family", "original"), [("llama-3", "trl:llama3"), ("gemma", "trl:gemma")])
def test_ours_equal_the_originals(chat_tokenizer, family, original):
    tokenizer = chat_tokenizer(family)
    for seed in range(50):
        messages = random_conversation(seed, system=False)
        assert render(tokenizer, messages) == render(tokenizer, messages, chat_template=template_text(original))


@pytest.mark.parametrize(
    ("family", "call", "result"),
    [
        (
            "chatml",
            '<tool_call>\n{"name": "time", "arguments": {"place": "é"}}\n</tool_call><|im_end|>',
            '<|im_start|>tool\n"noon"<|im_end|>',
        ),
        (
            "llama-3",
            '{"name": "time", "parameters": {"place": "é"}}<|eot_id|>',
            '<|start_header_id|>ipython<|end_header_id|>\n\n"noon"<|eot_id|>',
        ),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "time", "arguments": {"place": "é"}, "id": "abcdefghi"}]</s>',
            '[TOOL_RESULTS] {"content": "\\"noon\\"", "call_id": "abcdefghi"}[/TOOL_RESULTS]',
        ),
    ],
)
def test_tools_calls_and_results_are_rendered(chat_tokenizer, family, call, result):
    tokenizer = chat_tokenizer(family)
    for start in (TURNS[:2], TURNS[1:2]):
        text = render(tokenizer, [*start, CALLING, RESULT], tools=TOOLS)
        assert call + ("\n" if family == "chatml" else "") + result in text
        assert text.index('"weather"') < text.index("Hi")


def test_gemma_says_that_it_has_no_tools(chat_tokenizer):
    encoder = ExampleEncoder(chat_tokenizer("gemma"))
    for messages, tools in (([*TURNS[1:2], CALLING], None), (TURNS[1:3], TOOLS)):
        with pytest.raises(RowRefusedError, match=r"gemma: .*no tools"):
            encoder.encode(Conversation(messages, (None,) * len(messages), "x", "messages", tools))


@pytest.mark.parametrize("family", BUILT_IN_TEMPLATES)
def test_content_that_is_not_text_is_refused(chat_tokenizer, family):
    encoder = ExampleEncoder(chat_tokenizer(family))
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(RowRefusedError, match=f"{family}: the content of a message must be text"):
        encoder.encode(Conversation(messages, (None, None), "x", "messages"))


@pytest.mark.parametrize("family", BUILT_IN_TEMPLATES)
def test_a_template_goes_on_this_tokenizer_and_names_its_end_of_turn(chat_tokenizer, family):
    tokenizer, other = chat_tokenizer(family), chat_tokenizer(family)
    tokenizer.chat_template = other.chat_template = None
    template = apply_template(tokenizer, family)
    assert tokenizer.chat_template == template.jinja and other.chat_template is None
    assert derive_markers(tokenizer).ends == (template.end_of_turn or tokenizer.eos_token,)


def test_missing_tokens_are_listed_with_the_templates_that_fit(chat_tokenizer):
    tokenizer = chat_tokenizer("mistral")
    before = tokenizer.chat_template
    with pytest.raises(
        ModelError, match=r"'chatml' needs <\|im_start\|>, <\|im_end\|>, .*fit this tokenizer: mistral\."
    ):
        apply_template(tokenizer, "chatml")
    assert tokenizer.chat_template == before
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"needs an EOS token, .*fit this tokenizer: none\."):
        apply_template(tokenizer, "mistral")


def test_unknown_names_get_the_nearest_and_the_list():
    with pytest.raises(
        SettingsError, match=r"'chatlm' is neither.*Did you mean 'chatml'\?.*chatml, llama-3, gemma, mistral"
    ):
        get_template("chatlm")


def test_a_file_is_a_template(chat_tokenizer, tmp_path, caplog):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|stop|>' }}{% endfor %}", encoding="utf-8"
    )
    tokenizer = chat_tokenizer("chatml")
    with caplog.at_level(logging.WARNING):
        template = apply_template(tokenizer, path)
    assert template.name == str(path) and render(tokenizer, TURNS[2:3]) == "<|im_start|>Hello<|stop|>"
    (record,) = caplog.records
    assert "<|stop|>" in record.getMessage() and "<|im_start|>" not in record.getMessage()


def test_bad_files_are_refused_and_leave_the_tokenizer_alone(chat_tokenizer, tmp_path):
    tokenizer = chat_tokenizer("chatml")
    before = tokenizer.chat_template
    (tmp_path / "broken.jinja").write_text("line one\n{% for m in messages %}", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"broken\.jinja' is not valid Jinja: line 2"):
        apply_template(tokenizer, tmp_path / "broken.jinja")
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(SettingsError, match="cannot be read as UTF-8 text"):
        apply_template(tokenizer, tmp_path / "latin.jinja")
    with pytest.raises(SettingsError, match="neither a built-in template nor a file"):
        apply_template(tokenizer, tmp_path / "absent.jinja")
    assert tokenizer.chat_template == before


def test_the_encoder_passes_its_template_on(chat_tokenizer):
    with pytest.raises(ModelError, match="needs <start_of_turn>, <end_of_turn>"):
        ExampleEncoder(chat_tokenizer("chatml"), chat_template="gemma")
