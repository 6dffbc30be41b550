"""A Modelfile for Ollama, whose template makes the same prompts as the tokenizer's.

Ollama's templates are those of Go, and a Jinja template cannot be translated in general. But nearly all of them say the
same: something before and behind each message. That is read off from what the tokenizer's template makes of a few
conversations, and then both are compared on others; where they differ, no template is written, never a wrong one, and
Ollama uses the one in the GGUF file as far as it knows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

__all__ = ["Turns", "go_template", "modelfile", "read_turns", "rendered"]

Chat = list[dict[str, str]]

_SYSTEM, _FIRST, _ANSWER, _SECOND = "Ssystem7", "Ufirst7", "Aanswer7", "Usecond7"


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template writes around messages.

    Attributes:
        start: before everything.
        unsaid: where there is no system message, such as one of the template's own.
        system: before and behind a system message.
        is_inside: whether a system message stands in the first user turn, before its text.
        user, answer: before and behind a message.
        prompt: behind everything, where the answer begins.
    """

    start: str
    unsaid: str
    system: tuple[str, str]
    is_inside: bool
    user: tuple[str, str]
    answer: tuple[str, str]
    prompt: str


def read_turns(tokenizer: Any) -> Turns | str:
    """Return what the chat template of ``tokenizer`` writes around messages, or why that does not say it."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        return "the tokenizer has no chat template, or several"
    if "strftime_now" in template:
        return "the chat template writes the date, which a template of Ollama cannot"
    try:
        turns = _read(tokenizer)
        same = all(rendered(turns, chat) == _theirs(tokenizer, chat) for chat in _CHATS)
    except (TemplateError, ValueError):
        return "the chat template refuses a plain conversation with a system message"
    if not same:
        return "the chat template writes more than a fixed text around each message"
    pieces = "\n".join([turns.start, turns.unsaid, *turns.system, *turns.user, *turns.answer, turns.prompt])
    if "{{" in pieces or '"""' in pieces:
        return "the chat template writes {{ or three quotes, which mean something else to Ollama"
    return turns


def _read(tokenizer: Any) -> Turns:
    """Read the pieces off three conversations.

    Raises:
        ValueError: a message does not come back as it is.
    """
    ask: Chat = [{"role": "user", "content": _FIRST}]
    more: Chat = [*ask, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _SECOND}]
    led: Chat = [{"role": "system", "content": _SYSTEM}, *ask]
    before, behind = _cut(_theirs(tokenizer, ask), _FIRST)
    closed = _cut(tokenizer.apply_chat_template(ask, tokenize=False), _FIRST)[1]
    prompt = behind.removeprefix(closed)
    _, rest = _cut(_theirs(tokenizer, more), _FIRST)
    between, rest = _cut(rest, _ANSWER)
    following, _ = _cut(rest, _SECOND)
    ended = _cut(tokenizer.apply_chat_template(more[:2], tokenize=False), _ANSWER)[1]
    answer_behind = ended if following.startswith(ended) else following[: len(following) - len(before)]
    user_before = following.removeprefix(answer_behind)
    opening, rest = _cut(_theirs(tokenizer, led), _SYSTEM)
    system_behind, _ = _cut(rest, _FIRST)
    is_inside = not system_behind.endswith(user_before) if user_before else False
    own = before.removesuffix(user_before)
    start = opening.removesuffix(user_before) if is_inside else _common(opening, own)
    return Turns(
        start=start,
        unsaid=own.removeprefix(start),
        system=(
            "" if is_inside else opening.removeprefix(start),
            system_behind if is_inside else system_behind.removesuffix(user_before),
        ),
        is_inside=is_inside,
        user=(user_before, closed),
        answer=(between.removeprefix(closed), answer_behind),
        prompt=prompt,
    )


def _common(left: str, right: str) -> str:
    """Return what both begin with."""
    same = next((index for index, pair in enumerate(zip(left, right, strict=False)) if len(set(pair)) > 1), None)
    return left[: min(len(left), len(right)) if same is None else same]


def _cut(text: str, at: str) -> tuple[str, str]:
    before, found, behind = text.partition(at)
    if not found:
        raise ValueError(at)
    return before, behind


def _theirs(tokenizer: Any, chat: Chat) -> str:
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def _chat(*contents: str, system: str | None = None) -> Chat:
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


_CHATS = (
    _chat("Where is my order?"),
    _chat("Where is it?", "On its way.", "Since when?\n\nAnd how?"),
    _chat("Hello {name}!", "Hello.", "What is 2 + 2?", "4", "Thanks. {{ x }}"),
    _chat("Où est-elle ?", system="You are the support of a shop.\nAnswer briefly."),
    _chat("a", "b", "c", "d", "e", system="Say one letter."),
)


def rendered(turns: Turns, chat: Chat) -> str:
    """Return the prompt for ``chat``: what :func:`go_template` makes of it in Ollama."""
    system = "".join(message["content"] for message in chat if message["role"] == "system")
    text = turns.start
    if not turns.is_inside:
        text += f"{turns.system[0]}{system}{turns.system[1]}" if system else turns.unsaid
    for message in chat:
        if message["role"] == "user":
            inside = f"{system}{turns.system[1]}" if turns.is_inside and system else ""
            system = "" if turns.is_inside else system
            text += f"{turns.user[0]}{inside}{message['content']}{turns.user[1]}"
        elif message["role"] == "assistant":
            text += f"{turns.answer[0]}{message['content']}{turns.answer[1]}"
    return text + turns.prompt


def go_template(turns: Turns) -> str:
    """Return the template as Ollama reads it."""
    (before, behind), (ask, asked), (say, said_) = turns.system, turns.user, turns.answer
    if turns.is_inside:
        opening = f"{turns.start}{{{{ $system := .System }}}}"
        inside = f'{{{{ if $system }}}}{{{{ $system }}}}{behind}{{{{ $system = "" }}}}{{{{ end }}}}'
    else:
        unsaid = f"{{{{ else }}}}{turns.unsaid}" if turns.unsaid else ""
        opening = f"{turns.start}{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{unsaid}{{{{ end }}}}"
        inside = ""
    user = f'{{{{ if eq .Role "user" }}}}{ask}{inside}{{{{ .Content }}}}{asked}'
    answer = f'{{{{ else if eq .Role "assistant" }}}}{say}{{{{ .Content }}}}{said_}{{{{ end }}}}'
    return f"{opening}{{{{ range .Messages }}}}{user}{answer}{{{{ end }}}}{turns.prompt}"


def modelfile(files: list[str], turns: Turns | str, *, bos: str | None, stops: list[str]) -> str:
    """Return the text of a Modelfile.

    Args:
        files: of the model, the one to use first.
        turns: of :func:`read_turns`.
        bos: what the runtime puts before a prompt by itself, and the template therefore not.
        stops: texts at which an answer ends.
    """
    lines = [f"FROM ./{files[0]}", *(f"# FROM ./{other}" for other in files[1:])]
    if isinstance(turns, str):
        lines.append(f"# No TEMPLATE: {turns}. Ollama reads the one in the file.")
    else:
        written = go_template(turns)
        lines.append(f'TEMPLATE """{written.removeprefix(bos) if bos else written}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    return "\n".join(lines) + "\n"
