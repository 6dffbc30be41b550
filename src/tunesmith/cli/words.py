"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["amount", "bytes_in_words", "duration"]


def amount(number: float) -> str:
    """Return ``"3,210"``, and one decimal below 10: ``"2.5"``."""
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def bytes_in_words(count: float) -> str:
    """Return ``"312 MiB"`` or ``"1.42 GiB"``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Return ``"8.4 s"``, ``"3 min 20 s"`` or ``"2 h 05 min"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
