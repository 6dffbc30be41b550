"""ShareGPT's keys made those of chat templates, in rows that a script renders itself; a trainer reads both."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.core.names import did_you_mean
from tunesmith.data.messages import ROLES, list_keys

__all__ = ["standardize_data_formats", "standardize_sharegpt"]

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
    first = list(itertools.islice(dataset, _LOOKED_AT))
    column = _column(names or (first[0] if first else ()))
    more = {"system": aliases_for_system, "user": aliases_for_user, "assistant": aliases_for_assistant}
    roles = {**_ROLES, **{alias.lower(): role for role, aliases in more.items() for alias in aliases}}
    keys = _keys([turn for row in first for turn in row[column] or ()], roles)
    as_parts = hasattr(tokenizer, "image_processor")

    def standardized(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        turns = [_turn(turn, keys, roles, f"row {index + 1}: {column}") for turn in row[column] or ()]
        return {column: [_in_parts(turn) for turn in turns] if as_parts else turns}

    if isinstance(dataset, list):
        return [{**row, **standardized(row, index)} for index, row in enumerate(dataset)]
    # A stream has no processes.
    return dataset.map(standardized, with_indices=True, **({} if num_proc is None else {"num_proc": num_proc}))


standardize_data_formats = standardize_sharegpt


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


def _turn(
    turn: Mapping[str, Any], keys: tuple[tuple[str, str], ...], roles: Mapping[str, str], place: str
) -> dict[str, Any]:
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
