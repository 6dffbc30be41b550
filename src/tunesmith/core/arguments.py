"""Arguments that scripts give and nothing here follows: taken where they ask for nothing, refused where they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tunesmith.core.errors import SettingsError
from tunesmith.core.names import did_you_mean

__all__ = ["ANY", "Idle", "refuse_others"]

Idle = Mapping[str, tuple[tuple[Any, ...] | Callable[[Any], bool], str]]
"""Name -> the values that ask for nothing, or what says whether one does; and why nothing else can be followed."""

ANY = (None, True, False)


def refuse_others(where: str, others: Mapping[str, Any], idle: Idle, known: Iterable[str]) -> None:
    """Refuse those of ``others`` that are not in ``idle``, and those that ask ``where`` for what is not done.

    Raises:
        TypeError: an unknown name; the message names the nearest of ``known`` and ``idle``.
        SettingsError: a value that asks for something.
    """
    for name, value in others.items():
        if name not in idle:
            nearest = did_you_mean(name, [*known, *idle])
            raise TypeError(f"{where}() got an unknown argument {name!r}.{nearest}")
        empty, reason = idle[name]
        asks_nothing = empty(value) if callable(empty) else any(_same(value, nothing) for nothing in empty)
        if not asks_nothing:
            raise SettingsError(f"{where}({name}={value!r}): {reason}. Leave it out.")


def _same(value: Any, other: Any) -> bool:
    """Return whether two values are one, not by ==, for which 1 is True."""
    return value is other or (type(value) is type(other) and isinstance(value, (str, int)) and value == other)
