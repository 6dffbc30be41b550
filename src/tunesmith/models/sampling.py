"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Sampling"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Values for choosing a token, all off as they stand: the likeliest token is taken.

    Attributes:
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: sample from the likeliest tokens that together have this probability.
        top_k: sample from this many of the likeliest tokens; 0 is off.
        min_p: leave out what is less likely than this share of the likeliest token's probability.
        repetition_penalty: divides the (positive) score of tokens that were there already; 1 is off.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def faults(self) -> list[str]:
        """Return one text for each value outside its range."""
        checks = (
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1 is off)"),
        )
        return [f"{name}={value} must be {allowed}" for name, value, is_fine, allowed in checks if not is_fine]
