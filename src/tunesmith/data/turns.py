"""Where, in a rendered conversation, the text of one message lies. Text only; tokens come later, in ``masks.py``.

A chat template is a program: it may trim a message, put an empty think block before it, drop the reasoning of older
turns, or close the last turn with another token than the others. So nothing is searched for and nothing is assumed.
The template is rendered, and renderings are compared. For the assistant's turn ``i``:

    P   render(messages[:i], add_generation_prompt=True)    what the model is given when it is asked to answer
    E   render(messages[:i + 1])                            the same with the answer
    S   as E, with the answer replaced by a sentinel        what stands before and after the turn's own text

If E starts with P, everything after P was written by the model, think block and all: training starts there. If it
does not (DeepSeek-R1 opens a think block in P that E lacks), training starts where S shows that the message's own
text starts, provided P and E agree on all earlier messages; else the row is refused. The turn ends with the first
special token after the message's own text and those joined to it; a turn with tool calls, which templates write after
the text, ends with the last special token of E. White space behind that token belongs to nobody.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jinja2.exceptions import TemplateError

from tunesmith.data.templates import require_chat_template
from tunesmith.data.tokens import special_token_pattern
from tunesmith.data.types import RowRefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DROPS_TEXT",
    "NO_END_OF_TURN",
    "PROMPT_DIFFERS",
    "ChatRenderer",
    "Message",
    "Turn",
    "drops_a_message",
    "special_token_in",
]

Message = dict[str, Any]

# Notes that a turn can carry into the ledger.
PROMPT_DIFFERS = "inference prompt differs"
NO_END_OF_TURN = "no end-of-turn token"
DROPS_TEXT = "template drops part of an answer"

# Letters only: templates trim white space, split at tags and escape quotes, but leave a word alone.
_SENTINEL = "tunesmithsentinel"

# What a template can raise on a row that it does not like: its own ``raise_exception`` and jinja's errors, and what
# Python's operators raise on a value of the wrong kind ("a" + None, x[0], int("b"), a nesting too deep to walk).
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class Turn:
    """Where one message's trained text lies.

    Attributes:
        index: the message's place in the conversation.
        text: the rendering of the conversation up to and including this message.
        start, end: the trained characters of ``text``.
        is_closed: ``text[start:end]`` ends with a special token that ends an assistant's turn.
        prompt: what the model is given at inference; None where the template cannot render it, or for other roles.
        notes: categories for the ledger.
    """

    index: int
    text: str
    start: int
    end: int
    is_closed: bool
    prompt: str | None
    notes: tuple[str, ...] = ()


class ChatRenderer:
    """A tokenizer's chat template, rendered and compared.

    Args:
        tokenizer: its ``chat_template`` is used as it is at each call.
        chat_template: Jinja text to use in its place (that of a processor).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template
        self.special = special_token_pattern(tokenizer)

    def render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, *, generation_prompt: bool = False
    ) -> str:
        """Return the template's text for ``messages``.

        Raises:
            ModelError: the tokenizer has no chat template.
            RowRefusedError: the template refuses these messages; the detail is the template's own message.
        """
        if self._template is None:
            require_chat_template(self._tokenizer)
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=cast("Any", tools),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except _TEMPLATE_ERRORS as error:
            said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise RowRefusedError(
                "chat template refuses the row", f"the chat template refuses the row: {said}"
            ) from error
        return str(rendered)

    def locate_answer(self, messages: list[Message], index: int, tools: list[dict[str, Any]] | None = None) -> Turn:
        """Return where the assistant's turn ``messages[index]`` lies.

        Raises:
            RowRefusedError: the template renders the turn in a way that cannot be told apart from its prompt, or
                leaves out its tool calls.
        """
        message = messages[index]
        text = self.render(messages[: index + 1], tools)
        prompt = self._prompt(messages[:index], tools)
        around = self._around(messages[: index + 1], index, tools)
        notes: list[str] = []
        if prompt is not None and text.startswith(prompt):
            start = len(prompt)
        elif (
            around is not None
            and text.startswith(around[0])
            and self._share_history(messages[:index], tools, prompt, text)
        ):
            start = len(around[0])
            notes.append(PROMPT_DIFFERS)
        else:
            raise _unstable(index)
        after = around[1] if around is not None and not message.get("tool_calls") else None
        end, is_closed = self._end_of_turn(text, start, after)
        if not is_closed:
            notes.append(NO_END_OF_TURN)
        answer = text[start:end]
        _refuse_lost_tool_calls(message, answer, index)
        if around is None:
            _refuse_lost_answer(message, answer, index)
        shown = _squeeze(answer)
        if not all(_is_shown(_plain_text(message.get(part)), shown) for part in ("content", "reasoning_content")):
            notes.append(DROPS_TEXT)
        return Turn(index, text, start, end, is_closed, prompt, tuple(notes))

    def locate_content(self, messages: list[Message], index: int, tools: list[dict[str, Any]] | None = None) -> Turn:
        """Return where the content of ``messages[index]``, a message of any role, lies: without any marker token.

        Raises:
            RowRefusedError: the template does not show the content in one place.
        """
        text = self.render(messages[: index + 1], tools)
        around = self._around(messages[: index + 1], index, tools)
        if around is None or not (text.startswith(around[0]) and text.endswith(around[1])):
            raise _unstable(index)
        start, end = len(around[0]), len(text) - len(around[1])
        if end < start:
            raise _unstable(index)
        return Turn(index, text, start, end, False, None)

    def end_of_answer_in(
        self, whole: str, messages: list[Message], index: int, tools: list[dict[str, Any]] | None = None
    ) -> int | None:
        """Return where the token that ends answer ``index`` ends in ``whole``, the full rendering; None if nowhere.

        Weaker than :meth:`locate_answer`: the answer may be rendered there as no inference prompt would have it.
        """
        try:
            turn = self.locate_answer(messages, index, tools)
        except RowRefusedError:
            turn = None
        if turn is not None and turn.is_closed and whole.startswith(turn.text[: turn.end]):
            return turn.end
        around = self._around(messages, index, tools)
        if around is None or not whole.endswith(around[1]):
            return None
        first = self.special.search(whole, len(whole) - len(around[1]))
        return first.end() if first else None

    def _prompt(self, history: list[Message], tools: list[dict[str, Any]] | None) -> str | None:
        """Return the inference prompt, or None where there is none: no message yet, or one the template refuses."""
        if not history:
            return None
        try:
            return self.render(history, tools, generation_prompt=True)
        except RowRefusedError:
            return None

    def _share_history(
        self, history: list[Message], tools: list[dict[str, Any]] | None, prompt: str | None, text: str
    ) -> bool:
        """Return whether prompt and text both go on from the same rendering of all earlier messages."""
        if prompt is None:
            return True
        before = self.render(history, tools)
        return prompt.startswith(before) and text.startswith(before)

    def _around(
        self, messages: list[Message], index: int, tools: list[dict[str, Any]] | None
    ) -> tuple[str, str] | None:
        """Return the rendering before and after one message's own text; None if it has none or is not shown once.

        An empty message is left alone: templates write some things only where there is content.
        """
        content = messages[index].get("content")
        if not _plain_text(content).strip():
            return None
        sentinel = _SENTINEL
        while any(sentinel in _plain_text(message.get("content")) for message in messages):
            sentinel += "x"
        stand_in = sentinel if isinstance(content, str) else [{"type": "text", "text": sentinel}]
        try:
            replaced = {**messages[index], "content": stand_in}
            shown = self.render([*messages[:index], replaced, *messages[index + 1 :]], tools)
        except RowRefusedError:
            return None
        before, found, after = shown.partition(sentinel)
        return (before, after) if found and sentinel not in after else None

    def _end_of_turn(self, text: str, start: int, after: str | None) -> tuple[int, bool]:
        """Return where the turn ends and whether a special token ends it; ``after`` is what follows its own text."""
        if after is not None and text.endswith(after) and len(text) - len(after) >= start:
            first = self.special.search(text, len(text) - len(after))
            if first is not None:
                return self._end_of_run(text, first.end()), True
        else:
            ends = [match.end() for match in self.special.finditer(text, start)]
            if ends and not text[ends[-1] :].strip():
                return ends[-1], True
        return start + len(text[start:].rstrip()), False

    def _end_of_run(self, text: str, position: int) -> int:
        """Return the end of the special tokens that follow one another from ``position`` without a gap."""
        while (match := self.special.match(text, position)) is not None:
            position = match.end()
        return position


def drops_a_message(messages: list[Message], tools: list[dict[str, Any]] | None, whole: str) -> bool:
    """Return whether the text of a message that is no answer, or the name of a tool, is missing in ``whole``."""
    shown = _squeeze(whole)
    others = [_plain_text(message.get("content")) for message in messages if message["role"] != "assistant"]
    names = [str((tool.get("function") or tool).get("name") or "") for tool in tools or []]
    return not all(_is_shown(text, shown) for text in [*others, *names])


def special_token_in(value: Any, special: re.Pattern[str]) -> str | None:
    """Return a special token that stands written out in a string anywhere in a JSON value, or None."""
    waiting: list[Any] = [value]
    while waiting:
        item: Any = waiting.pop()
        if isinstance(item, str):
            found = special.search(item)
            if found is not None:
                return found.group()
        elif isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return None


def _unstable(index: int) -> RowRefusedError:
    return RowRefusedError(
        "chat template is not stable",
        f"the chat template is not stable: with message {index} it renders neither its own inference prompt nor a text "
        "in which the message can be found, so it cannot be told which characters are the message",
    )


def _plain_text(content: Any) -> str:
    """Return the text of a message's content: a string, a list of parts, or nothing."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return ""


def _squeeze(text: str) -> str:
    """Return the text without white space, which templates trim and change."""
    return "".join(text.split())


def _is_shown(text: str, squeezed: str) -> bool:
    """Return whether a text is part of a squeezed rendering, as it is or escaped as JSON."""
    return _squeeze(text) in squeezed or _squeeze(json.dumps(text, ensure_ascii=False)[1:-1]) in squeezed


def _refuse_lost_answer(message: Message, answer: str, index: int) -> None:
    """Refuse an answer of which the rendering holds nothing (templates of vision models want lists of parts)."""
    content = _plain_text(message.get("content"))
    if content.strip() and not message.get("tool_calls") and not _is_shown(content, _squeeze(answer)):
        raise RowRefusedError(
            "chat template drops the answer",
            f"the chat template renders nothing of the content of message {index}, so there is nothing to learn",
        )


def _refuse_lost_tool_calls(message: Message, answer: str, index: int) -> None:
    calls: Any = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        name = (call.get("function") or call).get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in answer:
            raise RowRefusedError(
                "chat template drops tool calls",
                f"the chat template does not render the call of {name!r} in message {index}: the model would learn to "
                "answer without calling anything. Use a template with tools (chatml, llama-3, mistral have them)",
            )
