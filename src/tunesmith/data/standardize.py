"""Rows made conversations, and ShareGPT's keys those of chat templates, for scripts that render rows themselves.

A trainer needs neither: it reads columns of instructions, ShareGPT and messages as they are.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.core.names import did_you_mean
from tunesmith.data.messages import ROLES, list_keys
from tunesmith.data.readers import kind_of

__all__ = ["standardize_data_formats", "standardize_sharegpt", "to_sharegpt"]

_COLUMNS = ("conversations", "messages")
_USUAL = (("from", "value"), ("role", "content"))
_ROLES = {**ROLES, "input": "user", "output": "assistant"}
_LOOKED_AT = 10
"""Rows that say which keys of a turn are its role and its content."""


def standardize_sharegpt(
    dataset: Any,
    tokenizer: Any = None,
    *,
    aliases_for_system: Iterable[str] = (),
    aliases_for_user: Iterable[str] = (),
    aliases_for_assistant: Iterable[str] = (),
    batch_size: int | None = None,
    num_proc: int | None = None,
) -> Any:
    """Return a ``datasets`` object, or a list of rows, whose conversations have ``role`` and ``content``.

    Columns are ``conversations`` or ``messages``; ``from`` and ``value`` become ``role`` and ``content``, and "human"
    and "gpt" "user" and "assistant", in any case of letters. What has these names already stays as it is. Of two other
    keys the one whose values are names of roles, or few, is the role.

    Args:
        tokenizer: with a processor contents become lists of parts, as templates of vision-language models want them.
        aliases_for_system, aliases_for_user, aliases_for_assistant: more names of these roles.
        batch_size: taken, and without use: rows do not depend on each other.
        num_proc: processes that do it, as in ``datasets``.

    Raises:
        DataError: there is no such column, or a turn has no role, an unknown one, or no content.
    """
    names = getattr(dataset, "column_names", None)
    if isinstance(names, dict):  # a DatasetDict
        how = {name: value for name, value in locals().items() if name not in ("dataset", "names")}
        return type(dataset)({split: standardize_sharegpt(part, **how) for split, part in dataset.items()})
    if not isinstance(dataset, list) and not hasattr(dataset, "map"):
        raise DataError(f"a {type(dataset).__name__} was given; a datasets object or a list of rows is needed.")
    first = list(itertools.islice(dataset, _LOOKED_AT))
    column = _column(names or (first[0] if first else ()))
    more = {"system": aliases_for_system, "user": aliases_for_user, "assistant": aliases_for_assistant}
    roles = {**_ROLES, **{alias.lower(): role for role, aliases in more.items() for alias in aliases}}
    keys = _keys([turn for row in first for turn in row[column] or () if isinstance(turn, Mapping)], roles)
    as_parts = hasattr(tokenizer, "image_processor")

    def standardized(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        turns = [_turn(turn, keys, roles, f"row {index + 1}: {column}") for turn in row[column] or ()]
        return {column: [_in_parts(turn) for turn in turns] if as_parts else turns}

    if isinstance(dataset, list):
        return [{**row, **standardized(row, index)} for index, row in enumerate(dataset)]
    # A stream has no processes.
    processes = {"num_proc": num_proc} if num_proc is not None and hasattr(dataset, "num_rows") else {}
    return dataset.map(standardized, with_indices=True, **processes)


standardize_data_formats = standardize_sharegpt


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """Return a ``datasets`` object, or a list of rows, with a column ``conversations`` in ShareGPT's keys.

    Args:
        merged_prompt: the question, with names of columns in braces; what stands in ``[[ ]]`` is left out where a
            column in it is empty. Without it the question is the column ``merged_column_name``.
        output_column_name: column of the answer.
        remove_unused_columns: keep nothing but the conversations.
        conversation_extension: questions in a conversation; behind a row's own come those of rows that
            ``random_state`` draws.

    Raises:
        DataError: a column is not there, or null where it is needed; or a stream is to be drawn from.
    """
    first = next(iter(dataset), {})
    asked = merged_prompt or f"{{{merged_column_name}}}"
    missing = [name for name in (*_FIELD.findall(asked), output_column_name) if name not in first]
    if missing:
        raise DataError(f"to_sharegpt: no column {missing[0]!r}: there are {', '.join(map(str, first)) or 'none'}.")
    if conversation_extension > 1 and not hasattr(dataset, "__len__"):
        raise DataError(f"conversation_extension={conversation_extension} draws rows, which a stream does not let.")
    orders: list[Sequence[int]] = []
    for number in range(1, conversation_extension):
        order = list(range(len(dataset)))
        random.Random(random_state + number).shuffle(order)
        orders.append(order)

    def conversation(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        places = [(row, index), *((dataset[order[index]], order[index]) for order in orders)]
        turns = [
            {"from": said_by, "value": _filled(text, own, place + 1)}
            for own, place in places
            for said_by, text in (("human", asked), ("gpt", f"{{{output_column_name}}}"))
        ]
        return {"conversations": turns}

    if isinstance(dataset, list):
        kept = [{} if remove_unused_columns else row for row in dataset]
        return [{**kept[index], **conversation(row, index)} for index, row in enumerate(dataset)]
    unused = [name for name in first if name != "conversations"] if remove_unused_columns else None
    return dataset.map(conversation, with_indices=True, remove_columns=unused)


_FIELD = re.compile(r"\{([^{}]+)\}")
_OPTIONAL_OR_FIELD = re.compile(rf"\[\[(?P<optional>.*?)\]\]|{_FIELD.pattern}", re.DOTALL)


def _filled(text: str, row: Mapping[str, Any], number: int) -> str:
    """Return ``text`` with the columns of a row in place of their names, in one pass: values may hold braces."""

    def value(name: str) -> str:
        if row.get(name) is None:
            raise DataError(f"row {number}: column {name!r} is null. Leave the row out, or write [[{{{name}}}]].")
        return str(row[name])

    def piece(match: re.Match[str]) -> str:
        optional = match["optional"]
        if optional is None:
            return value(match[2])
        is_there = all(row.get(name) not in (None, "") for name in _FIELD.findall(optional))
        return _FIELD.sub(lambda field: value(field[1]), optional) if is_there else ""

    return _OPTIONAL_OR_FIELD.sub(piece, text)


def _column(names: Any) -> str:
    found = next((name for name in _COLUMNS if name in names), None)
    if found is None:
        raise DataError(f"no column {' or '.join(_COLUMNS)}: there are {', '.join(map(str, names)) or 'none'}.")
    return found


def _keys(turns: list[Mapping[str, Any]], roles: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the pairs of keys that hold role and content: the usual ones, or the two that these turns have."""
    values: dict[str, list[str]] = defaultdict(list)
    for turn in turns:
        for key, value in turn.items():
            if isinstance(value, str):
                values[key].append(value)
    if len(values) != 2 or any(key in values for pair in _USUAL for key in pair):
        return _USUAL

    def unlike_roles(key: str) -> tuple[int, int]:
        return sum(value.lower() not in roles for value in values[key]), len(set(values[key]))

    role, content = sorted(values, key=unlike_roles)
    return (*_USUAL, (role, content))


def _turn(turn: Any, keys: tuple[tuple[str, str], ...], roles: Mapping[str, str], place: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place} has a turn that is {kind_of(turn)}, and no object with role and content.")
    # Tables give every turn the keys of all, null where it has none.
    pair = next((pair for pair in keys if turn.get(pair[0]) is not None), None)
    if pair is None:
        expected = " or ".join(f"{role} and {content}" for role, content in keys)
        raise DataError(f"{place} has a turn without role; its keys are {list_keys(turn)}. Name them {expected}.")
    said, content = turn[pair[0]], turn.get(pair[1])
    role = roles.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise DataError(
            f"{place} has a turn with {pair[0]}={said!r:.60}, which is no known role (its keys are {list_keys(turn)})."
            f"{did_you_mean(str(said), roles)} Known are {', '.join(roles)}; aliases_for_user=[...], "
            "aliases_for_assistant=[...] and aliases_for_system=[...] add others."
        )
    if content is None and not turn.get("tool_calls"):
        raise DataError(f"{place} has a turn of {role} without {pair[1]}; its keys are {list_keys(turn)}.")
    return {**{key: value for key, value in turn.items() if key not in pair}, "role": role, "content": content}


def _in_parts(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn["content"]
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn
