"""The nearest known name to a mistyped one, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest"]


def nearest(name: str, known: Iterable[str], *, most: int = 1) -> list[str]:
    """Return up to ``most`` entries of ``known`` that look like ``name``, best first; case is ignored."""
    by_lower = {entry.lower(): entry for entry in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=most, cutoff=0.6)
    return [by_lower[match] for match in matches]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` or an empty string, ready to append to a message."""
    found = nearest(name, known)
    return f" Did you mean {found[0]!r}?" if found else ""
