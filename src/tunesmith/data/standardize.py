"""ShareGPT's keys made those of chat templates, in rows that a script renders itself; a trainer reads both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.data.messages import ROLES

__all__ = ["standardize_data_formats", "standardize_sharegpt"]

_COLUMNS = ("conversations", "messages")


def standardize_sharegpt(dataset: Any) -> Any:
    """Return a ``datasets`` object, or a list of rows, whose conversations have ``role`` and ``content``.

    Columns are ``conversations`` or ``messages``; ``from`` and ``value`` become ``role`` and ``content``, and "human"
    and "gpt" "user" and "assistant". What has these names already stays as it is.

    Raises:
        DataError: there is no such column.
    """
    names = getattr(dataset, "column_names", None)
    if isinstance(names, dict):  # a DatasetDict
        return type(dataset)({split: standardize_sharegpt(part) for split, part in dataset.items()})
    if names is None and isinstance(dataset, list):
        return [_standardized(row, _column(row)) for row in dataset]
    column = _column(names or ())

    def standardized(row: dict[str, Any]) -> dict[str, Any]:
        return {column: _standardized(row, column)[column]}

    return dataset.map(standardized)


standardize_data_formats = standardize_sharegpt


def _column(names: Any) -> str:
    found = next((name for name in _COLUMNS if name in names), None)
    if found is None:
        raise DataError(f"no column {' or '.join(_COLUMNS)}: there are {', '.join(map(str, names)) or 'none'}.")
    return found


def _standardized(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for turn in row[column] or ():
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        turns.append({**rest, "role": ROLES.get(role, role), "content": content})
    return {**row, column: turns}
