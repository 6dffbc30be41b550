"""What a row means: its schema is recognised by its keys (or a mapping names the columns) and it becomes an Example.

    messages            ``messages`` [``tools``, ``system``]; a message may carry ``weight`` 0/1 or ``train`` true/false
    sharegpt            ``conversations`` of ``from``/``value`` or ``role``/``content`` [``system``, ``tools``]
    alpaca              ``instruction``, ``output`` [``input``, ``system``, ``history``, ``tools``]
    prompt-completion   ``prompt``, ``completion``: two texts, or two lists of messages [``tools``]
    evals               ``input``: messages or text; ``ideal``: text, a list of texts (the first), a message [``tools``]
    text                ``text``
    tokens              ``input_ids`` [``labels``, ``attention_mask``, ``completion_mask``, ``assistant_masks``]

Messages may show images, in their content or in a column ``images`` or ``image`` of the row (see ``images.py``).

Rows for preference training are recognised and refused. The first schema of the table whose keys are all there wins, so
that the rendered ``text`` column that many chat data sets carry besides does not hide their messages. A null under one
of these keys refuses the row; it does not make it a row of another schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import DataError
from tunesmith.core.names import did_you_mean
from tunesmith.data.files import read_rows
from tunesmith.data.images import images_of
from tunesmith.data.messages import (
    Flags,
    Messages,
    build_conversation,
    check_text,
    list_keys,
    read_messages,
    read_text,
    read_tools,
    refuse,
)
from tunesmith.data.readers import kind_of
from tunesmith.data.types import Completion, Conversation, Example, SourceRow, Text, Tokens

__all__ = ["check_mapping", "detect_schema", "text_goes_first", "to_example"]

_IGNORED = -100
_ROLES = ("system", "user", "assistant")
_FIELDS = ("messages", "conversations", "instruction", "output", "history", "prompt", "completion", "input", "ideal")
_MAPPING_TARGETS = (*_ROLES, "tools", *_FIELDS, "text")


def to_example(row: SourceRow, mapping: Mapping[str, str] | None = None) -> Example:
    """Return the row as a conversation, a plain completion, or text.

    Args:
        row: one row as read.
        mapping: source column -> role (system, user, assistant) or field of a schema (``{"question": "user", "answer":
            "assistant"}``, ``{"body": "text"}``, ``{"chat": "messages"}``). Only mapped columns are then used. Columns
            of one role are joined with a blank line, in the mapping's order.

    Raises:
        RowRefusedError: this row cannot be used; ``reason`` is its category, the text says why.
        DataError: the mapping itself is wrong.
    """
    if mapping is not None:
        value, is_by_role = _apply_mapping(row.value, mapping)
        if is_by_role:
            return _from_columns(value, row.where)
    else:
        value = row.value
    return _BUILDERS[detect_schema(value)](value, row.where)


def text_goes_first(rows: Any) -> bool:
    """Return whether a list or ``datasets`` object has a ``text`` column beside others that are no chat.

    Scripts for TRL write such a column to be trained on; a rendered one beside messages is only there to be looked at.
    """
    if not isinstance(rows, list) and not hasattr(rows, "column_names"):
        return False
    # Column names are unknown for a stream that is mapped, and those of a set of splits are split names.
    names = next(read_rows(rows)).value.keys()
    return "text" in names and detect_schema(dict.fromkeys(names, "")) in ("alpaca", "evals")


def detect_schema(value: Mapping[str, Any]) -> str:
    """Return the name of the schema whose keys ``value`` has; see the table at the top of this file.

    Raises:
        RowRefusedError: none fits; the text lists the row's keys, the accepted ones and the nearest.
    """
    if isinstance(value.get("label"), bool) and {"prompt", "completion"} <= value.keys():
        return "unpaired"
    for schema in _SCHEMAS:
        if value.keys() >= schema.required:
            return schema.name
    known = {key for schema in _SCHEMAS for key in schema.required}
    near = next((hint for key in list(value)[:20] if (hint := did_you_mean(str(key)[:60], known))), "")
    refuse(
        "unknown schema",
        f"the row has the keys {list_keys(value)}. Accepted are {_ACCEPTED}",
        hint=f"{near} Other columns need a mapping, for example question=user, answer=assistant.",
    )


def check_mapping(mapping: Mapping[str, str]) -> None:
    """Raise :class:`DataError` where a mapping can fit no row: no entry, an unknown target, or targets that clash."""
    if not mapping:
        raise DataError(f"the column mapping is empty. Map a column to one of {', '.join(_MAPPING_TARGETS)}.")
    for column, target in mapping.items():
        if target not in _MAPPING_TARGETS:
            near = did_you_mean(target, _MAPPING_TARGETS)
            allowed = ", ".join(_MAPPING_TARGETS)
            raise DataError(f"column {column!r} is mapped to {target!r}, which is not one of {allowed}.{near}")
    targets = list(mapping.values())
    if _is_by_role(targets):
        clash = [target for target in targets if target not in (*_ROLES, "tools")]
        if clash:
            raise DataError(f"a mapping names roles or fields, not both: 'user' or 'assistant' beside {clash[0]!r}.")
        if "assistant" not in targets:
            raise DataError("the mapping names no column for the assistant, so there would be no answer to train on.")
    elif not any(schema.required <= set(targets) <= schema.required | schema.optional for schema in _SCHEMAS):
        raise DataError(f"a mapping to {', '.join(targets)} makes no whole row. Accepted are {_ACCEPTED}.")
    single = [target for target in targets if target not in _ROLES or not _is_by_role(targets)]
    twice = next((target for target in single if single.count(target) > 1), None)
    if twice is not None:
        raise DataError(f"two columns are mapped to {twice!r}. Only the roles system, user and assistant take several.")


# --- mapping ----------------------------------------------------------------------------------------------------------


def _is_by_role(targets: Iterable[str]) -> bool:
    return bool({"user", "assistant"} & set(targets))


def _apply_mapping(value: Mapping[str, Any], mapping: Mapping[str, str]) -> tuple[dict[str, Any], bool]:
    """Return the mapped columns under their new names; for roles, a list of values a role."""
    check_mapping(mapping)
    for column in mapping:
        if column not in value:
            detail = f"there is no column {column!r}; the row has the keys {list_keys(value)}"
            refuse("mapped column missing", detail, hint=did_you_mean(column, map(str, value)))
    if not _is_by_role(mapping.values()):
        return {target: value[column] for column, target in mapping.items()}, False
    grouped: dict[str, Any] = {}
    for column, target in mapping.items():
        grouped.setdefault(target, []).append((column, value[column]))
    return grouped, True


def _from_columns(grouped: Mapping[str, list[tuple[str, Any]]], where: str) -> Conversation:
    messages: Messages = []
    for role in _ROLES:
        optional = role == "system"
        cells = [(column, cell) for column, cell in grouped.get(role, []) if not (optional and cell is None)]
        texts = [read_text(cell, field=f"column {column!r}") for column, cell in cells]
        text = "\n\n".join([text for text in texts if text.strip()] or texts[:1])
        if cells and (text or not optional):
            messages.append({"role": role, "content": text})
    tools = next((cell for _, cell in grouped.get("tools", [])), None)
    return _conversation(messages, {"tools": tools}, where, schema="columns")


# --- schemas ----------------------------------------------------------------------------------------------------------


def _conversation(
    messages: Messages, value: Mapping[str, Any], where: str, *, schema: str, train: Flags | None = None
) -> Conversation:
    flags = train if train is not None else (None,) * len(messages)
    tools, functions = read_tools(value.get("tools")), read_tools(value.get("functions"), field="functions")
    if tools and functions:
        refuse("bad tools", "the row has tools and functions, which say the same")
    # OpenAI's older form: what a tool has under "function" stands by itself.
    tools = tools or ([{"type": "function", "function": function} for function in functions] if functions else None)
    return build_conversation(messages, flags, where=where, schema=schema, tools=tools, images=images_of(value))


def _from_messages(value: Mapping[str, Any], where: str) -> Conversation:
    return _from_chat(value, where, field="messages", schema="messages")


def _from_sharegpt(value: Mapping[str, Any], where: str) -> Conversation:
    return _from_chat(value, where, field="conversations", schema="sharegpt")


def _from_chat(value: Mapping[str, Any], where: str, *, field: str, schema: str) -> Conversation:
    messages, train = read_messages(value[field], field=field)
    system = _system(value)
    if system and messages[0]["role"] == "system":
        refuse("two system messages", f"the row has a 'system' column, and {field} begins with a system message")
    return _conversation([*system, *messages], value, where, schema=schema, train=(*(None for _ in system), *train))


def _from_alpaca(value: Mapping[str, Any], where: str) -> Conversation:
    instruction = read_text(value["instruction"], field="instruction")
    extra = read_text(value["input"], field="input") if value.get("input") is not None else ""
    output = read_text(value["output"], field="output")
    asked = "\n\n".join([text for text in (instruction, extra) if text.strip()] or [instruction])
    turn = [_message("user", asked), _message("assistant", output)]
    return _conversation([*_system(value), *_history(value.get("history")), *turn], value, where, schema="alpaca")


def _history(value: object) -> Messages:
    """Return the earlier turns of an alpaca row: a list of [question, answer] pairs."""
    turns: Any = [] if value in (None, "") else value
    if not isinstance(turns, list) or not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in turns):
        refuse("wrong type", "history must be a list of [question, answer] pairs")
    return [
        _message(role, read_text(text, field=f"history[{index}]"))
        for index, turn in enumerate(turns)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _from_prompt_completion(value: Mapping[str, Any], where: str) -> Example:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _continue(prompt, "prompt", completion, "completion", value, where, schema="prompt-completion")
    if isinstance(prompt, list) != isinstance(completion, list):
        kinds = f"prompt is {kind_of(prompt)}, completion is {kind_of(completion)}"
        refuse("wrong type", f"{kinds}; both must be text, or both lists of messages")
    _refuse_images(value)
    prompt, completion = read_text(prompt, field="prompt"), read_text(completion, field="completion")
    if not completion.strip():
        refuse("empty answer", "the completion is empty")
    check_text([prompt, completion])
    return Completion(prompt=prompt, completion=completion, where=where)


def _from_evals(value: Mapping[str, Any], where: str) -> Conversation:
    asked, ideal = value["input"], value["ideal"]
    if isinstance(ideal, list) and ideal:
        ideal = cast(list[Any], ideal)[0]
    answer = ideal if isinstance(ideal, dict) else _message("assistant", read_text(ideal, field="ideal"))
    prompt = [_message("user", asked)] if isinstance(asked, str) else asked
    return _continue(prompt, "input", [answer], "ideal", value, where, schema="evals")


def _continue(
    prompt: object,
    prompt_field: str,
    completion: object,
    field: str,
    value: Mapping[str, Any],
    where: str,
    *,
    schema: str,
) -> Conversation:
    """Join prompt and completion; answers in the prompt are context and never train."""
    before, before_flags = read_messages(prompt, field=prompt_field)
    after, after_flags = read_messages(completion, field=field)
    if not any(message["role"] == "assistant" for message in after):
        refuse("no assistant turn", f"{field} has no assistant message to train on")
    context = tuple(
        False if message["role"] == "assistant" else flag for message, flag in zip(before, before_flags, strict=True)
    )
    return _conversation([*before, *after], value, where, schema=schema, train=(*context, *after_flags))


def _refuse_images(value: Mapping[str, Any]) -> None:
    """Plain text has no place for an image."""
    if images_of(value):
        refuse("images beside plain text", "the row has images beside plain text; write it as messages to train on it")


def _from_text(value: Mapping[str, Any], where: str) -> Text:
    _refuse_images(value)
    text = read_text(value["text"], field="text")
    if not text.strip():
        refuse("empty text", "the text is empty")
    check_text(text)
    return Text(text=text, where=where)


def _from_tokens(value: Mapping[str, Any], where: str) -> Tokens:
    """Take ids and masks as they are: labels of -100 are not trained, places without attention are left out."""
    ids = _integers(value["input_ids"], "input_ids")

    def beside(name: str, default: int) -> NDArray[np.int64]:
        given = value.get(name)
        found = np.full(len(ids), default) if given is None else _integers(given, name)
        if len(found) != len(ids):
            refuse("bad tokens", f"{name} has {len(found)} entries and input_ids {len(ids)}")
        return found

    labels, is_there = beside("labels", 0), beside("attention_mask", 1) != 0
    trained = (labels != _IGNORED) if value.get("labels") is not None else np.ones(len(ids), dtype=bool)
    for name in ("completion_mask", "assistant_masks"):
        trained &= beside(name, 1) != 0
    wrong = np.flatnonzero(trained & (labels != ids) & (value.get("labels") is not None)).tolist()
    if wrong:
        detail = f"labels[{wrong[0]}] is {labels[wrong[0]]} and input_ids[{wrong[0]}] {ids[wrong[0]]}"
        refuse("bad tokens", f"{detail}; a label is its own token (the loss shifts them) or -100")
    if is_there.sum() < 2 or ids.min() < 0:
        refuse("bad tokens", "input_ids must hold two tokens or more, none below 0")
    return Tokens(ids[is_there].astype(np.int32), trained[is_there], where)


def _integers(value: object, name: str) -> NDArray[np.int64]:
    try:
        found = np.asarray(value)
    except ValueError:
        found = np.zeros((0, 0))
    if found.ndim != 1 or not (np.issubdtype(found.dtype, np.integer) or found.dtype == bool):
        refuse("bad tokens", f"{name} must be a list of whole numbers")
    return found.astype(np.int64)


def _refuse_preference(value: Mapping[str, Any], where: str) -> Example:
    refuse(
        f"{detect_schema(value)} rows",
        "rows of this kind are for preference or reward training, which is not available yet. For supervised training, "
        "map the columns to train on, for example prompt=user, chosen=assistant",
    )


def _system(value: Mapping[str, Any]) -> Messages:
    system = value.get("system")
    return [_message("system", read_text(system, field="system"))] if system not in (None, "") else []


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


_ACCEPTED = (
    "messages; conversations; instruction + output; prompt + completion; input + ideal (OpenAI evals); text; or "
    "input_ids"
)


@dataclass(frozen=True, slots=True)
class _Schema:
    name: str
    required: frozenset[str]
    optional: frozenset[str]
    build: Callable[[Mapping[str, Any], str], Example]


def _schema(name: str, required: str, optional: str, build: Callable[[Mapping[str, Any], str], Example]) -> _Schema:
    return _Schema(name, frozenset(required.split()), frozenset(optional.split()), build)


# Order matters: the first whose required keys are all there wins.
_SCHEMAS = (
    _schema("tokens", "input_ids", "labels attention_mask completion_mask assistant_masks", _from_tokens),
    _schema("preference", "chosen rejected", "prompt", _refuse_preference),
    _schema("stepwise", "completions labels", "prompt", _refuse_preference),
    _schema("unpaired", "kto_tag", "", _refuse_preference),
    _schema("messages", "messages", "system tools", _from_messages),
    _schema("sharegpt", "conversations", "system tools", _from_sharegpt),
    _schema("alpaca", "instruction output", "input system history tools", _from_alpaca),
    _schema("prompt-completion", "prompt completion", "tools", _from_prompt_completion),
    _schema("evals", "input ideal", "tools", _from_evals),
    _schema("text", "text", "", _from_text),
)
_BUILDERS = {schema.name: schema.build for schema in _SCHEMAS}
