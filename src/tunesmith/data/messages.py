"""A list of chat messages as data sets write it -> the list that chat templates expect, checked.

Takes ``role``/``content`` and ShareGPT's ``from``/``value`` in the same place. What it settles, so that no template
has to: role names, text parts joined, null fields removed, tool calls as objects with their arguments parsed, reasoning
under both names in use, train flags taken out. What it cannot use it refuses with the place in the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, cast

from tunesmith.core.names import did_you_mean
from tunesmith.data.images import image_in, place_images
from tunesmith.data.readers import kind_of
from tunesmith.data.types import Conversation, RowRefusedError

__all__ = [
    "ROLES",
    "Flags",
    "Messages",
    "build_conversation",
    "check_text",
    "list_keys",
    "read_messages",
    "read_text",
    "read_tools",
    "refuse",
]

Messages = list[dict[str, Any]]
Flags = tuple[bool | None, ...]

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's name for the system message of its newer models
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_DEEPEST = 100
_REASONING = ("reasoning_content", "thinking", "reasoning")


def read_messages(value: object, *, field: str) -> tuple[Messages, Flags]:
    """Return template-ready messages and their train flags (None where the row does not say).

    Each message keeps its own extra keys (``name``, ``tool_call_id``, ...) where they are not null. ``content`` is
    text, or None in an assistant message that only calls tools, which is what OpenAI writes and templates test for, or,
    where it shows images, a list of parts ``{"type": "text", "text"}`` and ``{"type": "image", "image"}``; ``image`` is
    None in a part that only marks the place.

    Raises:
        RowRefusedError: ``value`` is no such list; ``field`` names it in the message.
    """
    if value is None:
        refuse("null content", f"{field} is null")
    value = _parse_if_text(value, field, reason="wrong type")
    if not isinstance(value, (list, tuple)):
        refuse("wrong type", f"{field} must be a list of messages, not {kind_of(value)}")
    if not value:
        refuse("no messages", f"{field} is an empty list")
    read = [_read_message(entry, f"{field}[{index}]") for index, entry in enumerate(cast(list[object], value))]
    return [message for message, _ in read], tuple(flag for _, flag in read)


def build_conversation(
    messages: Messages,
    train: Flags,
    *,
    where: str,
    schema: str,
    tools: list[dict[str, Any]] | None,
    images: Sequence[Any] = (),
) -> Conversation:
    """Return the :class:`Conversation` after the checks that concern the messages together.

    ``images`` are those of the row itself: for the places that messages mark, or, where they mark none, at the start of
    the first user message.

    Raises:
        RowRefusedError: a system message is not the first, no assistant turn, an answer to train on that is empty,
            text that is not valid Unicode, or other than one image for each place.
    """
    messages, shown = place_images(messages, images)
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        at = roles.index("system", 1)
        detail = f"message {at + 1} of {len(roles)} is a system message; only the first may be"
        refuse("system message not first", detail)
    if "assistant" not in roles:
        found = ", ".join(dict.fromkeys(roles))
        refuse("no assistant turn", f"the conversation has only the roles {found}: there is no answer to train on")
    for number, (message, flag) in enumerate(zip(messages, train, strict=True), 1):
        if flag is not False and message["role"] == "assistant" and _is_empty(message):
            refuse("empty answer", f"message {number} of {len(roles)} is an assistant message without text")
    check_text([messages, tools])
    return Conversation(messages=messages, train=train, where=where, schema=schema, tools=tools, images=shown)


def read_text(value: object, *, field: str) -> str:
    """Return ``value`` if it is text, else refuse the row; ``field`` names it in the message."""
    if value is None:
        refuse("null content", f"{field} is null")
    if not isinstance(value, str):
        refuse("wrong type", f"{field} must be text, not {kind_of(value)}")
    return value


def read_tools(value: object, *, field: str = "tools") -> list[dict[str, Any]] | None:
    """Return tool schemas from a list of objects or its JSON text; None where there are none."""
    if value is None or value == "" or value == []:
        return None
    value = _parse_if_text(value, field, reason="bad tools")
    tools = cast(list[object], value) if isinstance(value, list) else [value]
    if not all(isinstance(tool, dict) for tool in tools):
        refuse("bad tools", f"{field} must be a list of objects that describe one tool each")
    return cast(list[dict[str, Any]], tools) or None


def check_text(value: object) -> None:
    """Refuse the row where any text inside ``value`` cannot be written as UTF-8, or objects nest too deeply."""
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:  # a loop, because recursion is what deep nesting breaks
        item, depth = waiting.pop()
        if isinstance(item, str):
            _check_encodable(item)
        elif depth > _DEEPEST:
            refuse("nested too deeply", f"the row nests objects deeper than {_DEEPEST} levels")
        elif isinstance(item, dict):
            waiting.extend((entry, depth + 1) for pair in cast(dict[Any, Any], item).items() for entry in pair)
        elif isinstance(item, (list, tuple)):
            waiting.extend((entry, depth + 1) for entry in cast(Iterable[object], item))


def refuse(reason: str, detail: str, *, hint: str = "") -> NoReturn:
    """Raise :class:`RowRefusedError`; ``detail`` is a sentence without its full stop, ``hint`` follows it."""
    raise RowRefusedError(reason, f"{detail}.{hint}")


def list_keys(value: Iterable[object]) -> str:
    """Return up to ten keys, quoted, for a message."""
    keys = [f"{key!r:.40}" for key in value]
    return (", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")) or "none"


def _read_message(entry: object, place: str) -> tuple[dict[str, Any], bool | None]:
    if not isinstance(entry, dict):
        refuse("wrong type", f"{place} must be an object with role and content, not {kind_of(entry)}")
    fields = {key: value for key, value in cast(dict[str, Any], entry).items() if value is not None}
    role_key, content_key = ("from", "value") if "from" in fields and "role" not in fields else ("role", "content")
    if role_key not in fields:
        refuse("message without role", f"{place} has no role; its keys are {list_keys(fields)}")
    said = fields.pop(role_key)
    role = _read_role(said, place)
    content = _read_content(fields.pop(content_key, None), f"{place} ({role})")
    flag = _read_flag(fields, place)
    calls, single = fields.pop("tool_calls", None), fields.pop("function_call", None)
    if calls and single:
        refuse("bad tool call", f"{place} has tool_calls and function_call, which say the same")
    calls = calls or single
    if said == "function_call":
        calls, content = _parse_if_text(content, f"{place} (function_call)", reason="bad tool call"), None
    message: dict[str, Any] = {"role": role, "content": content, **fields}
    if calls:
        if role != "assistant":
            refuse("bad tool call", f"{place} ({role}) has tool_calls; only an assistant message may")
        message["tool_calls"] = _read_calls(calls, place)
    elif content is None:
        refuse("null content", f"{place} ({role}) has no content and no tool_calls")
    return _with_reasoning(message, place), flag


def _read_role(role: object, place: str) -> str:
    if not isinstance(role, str):
        refuse("wrong type", f"the role of {place} must be text, not {kind_of(role)}")
    if role not in ROLES:
        detail = f"{place} has the role {role[:60]!r}; known are {', '.join(ROLES)}"
        refuse(f"unknown role {role[:30]!r}", detail, hint=did_you_mean(role[:60], ROLES))
    return ROLES[role]


def _read_content(content: object, place: str) -> str | list[dict[str, Any]] | None:
    """Return text, a list of text parts joined, a list of parts with images among them, or None."""
    if not isinstance(content, (list, tuple)):
        return None if content is None else read_text(content, field=f"the content of {place}")
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(cast(list[object], content)):
        fields = cast(dict[str, Any], part) if isinstance(part, dict) else {"text": part}
        text, kind = fields.get("text"), fields.get("type", "text")
        if kind in ("image", "image_url"):
            parts.append({"type": "image", "image": image_in(fields)})
            continue
        if kind != "text" or not isinstance(text, str):
            detail = f"part {number} of the content of {place} is of type {fields.get('type', kind_of(text))!r:.40}"
            refuse("content is not text", f"{detail}; only text and images are read")
        parts.append({"type": "text", "text": text})
    return parts if any(part["type"] == "image" for part in parts) else "".join(part["text"] for part in parts)


def _read_flag(fields: dict[str, Any], place: str) -> bool | None:
    """Take ``weight`` (0 or 1) and ``train`` (true or false) out of ``fields``."""
    weight, train = fields.pop("weight", None), fields.pop("train", None)
    if weight is not None and weight not in (0, 1):
        refuse("bad weight", f"the weight of {place} must be 0 or 1, not {weight!r:.40}")
    if train is not None and not isinstance(train, bool):
        refuse("bad train flag", f"the train flag of {place} must be true or false, not {train!r:.40}")
    if weight is None:
        return train
    if train is not None and train != bool(weight):
        refuse("bad train flag", f"{place} says weight {weight} and train {train}")
    return bool(weight)


def _read_calls(calls: object, place: str) -> list[dict[str, Any]]:
    entries = cast(list[object], calls) if isinstance(calls, list) else [calls]
    return [_read_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(entries)]


def _read_call(call: object, place: str) -> dict[str, Any]:
    """Return ``{"type": "function", "function": {"name", "arguments"}}`` with the row's own ``id`` where it has one."""
    outer = cast(dict[str, Any], call) if isinstance(call, dict) else {}
    function = outer.get("function", outer)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        refuse("bad tool call", f"{place} must be an object with the name of a function and its arguments")
    function = cast(dict[str, Any], function)
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _parse_or_keep(arguments, place)
    kept = {key: value for key, value in outer.items() if key == "id" and value is not None}
    return {"type": "function", **kept, "function": {"name": function["name"], "arguments": arguments}}


def _parse_or_keep(text: str, place: str) -> Any:
    """Return the object that ``text`` writes in JSON (templates want objects), or ``text`` where it writes none."""
    try:
        value = json.loads(text)
    except RecursionError:
        refuse("nested too deeply", f"the arguments of {place} nest too deeply")
    except ValueError:
        return text
    return cast(Any, value) if isinstance(value, dict) else text


def _parse_if_text(value: object, field: str, *, reason: str) -> Any:
    """Parse JSON text, as CSV files and some data sets hold structured columns; give anything else back."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        refuse(reason, f"{field} is the text {value[:40]!r}, which is not valid JSON")


def _with_reasoning(message: dict[str, Any], place: str) -> dict[str, Any]:
    """Give reasoning under all its names: templates read ``reasoning_content`` (qwen3) or ``thinking`` (gpt-oss).

    Servers write ``reasoning``, too, which few templates read.
    """
    written = [message[key] for key in _REASONING if key in message]
    for text in written:
        read_text(text, field=f"the reasoning of {place}")
    if any(text != written[0] for text in written):
        names = " and ".join(key for key in _REASONING if key in message)
        refuse("two reasonings", f"{place} has both {names}, and they differ")
    return {**message, **dict.fromkeys(_REASONING, written[0])} if written else message


def _is_empty(message: dict[str, Any]) -> bool:
    content = message["content"]
    said = [part.get("text") for part in content] if isinstance(content, list) else [content]
    return not message.get("tool_calls") and not any(
        text and text.strip() for text in [*said, message.get("reasoning_content")]
    )


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 10) : error.start + 10]
        refuse("not valid Unicode", f"near {near!r} stands half of a surrogate pair, which UTF-8 cannot hold")
