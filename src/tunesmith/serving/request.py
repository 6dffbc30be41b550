"""What is asked of the engine, and what it gives back while it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tunesmith.models.sampling import Sampling
from tunesmith.serving.choose import Choice

__all__ = ["Delta", "Finish", "Request"]

Finish = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: a stop token or string, its longest length, its asker, or a failure of this machine."""


@dataclass(frozen=True, slots=True)
class Request:
    """One answer that is wanted.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: longest answer.
        adapter: name of a known adapter; None: the base alone.
        stop: strings that end the answer and are no part of it.
        seed: for sampling; None draws one.
        presence_penalty: taken from the score of each token that the answer has already.
        frequency_penalty: taken from it as often as the answer has it.
        top_logprobs: likeliest tokens to report with each token; None reports no log-probabilities.
        ignore_end: go on after an end token, to measure.
        continues: the answer is more of the prompt's text, and not a turn of its own: a space between them counts.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 256
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None
    ignore_end: bool = False
    continues: bool = False

    def faults(self, window: int, rows: int) -> list[str]:
        """Return one text for each value that cannot be served with ``window`` tokens and ``rows`` known ones."""
        size = len(self.prompt)
        longest = window - size
        fits = f"the prompt has {size} tokens, which leaves {max(longest, 0)} of {window} for the answer"
        is_count = _is_whole(self.max_new_tokens)
        unknown = next((repr(part) for part in self.prompt if not _is_whole(part, 0, rows)), "")
        checks = (
            (size > 0, "the prompt is empty"),
            (not unknown, f"there is no token {unknown}: the model knows {rows}"),
            (is_count, f"max_new_tokens={self.max_new_tokens!r} must be a whole number"),
            (not is_count or 0 < longest >= self.max_new_tokens, f"{fits}, not max_new_tokens={self.max_new_tokens}"),
            (not is_count or self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be 1 or more"),
            ("" not in self.stop, "an empty stop string would end every answer at once"),
            (self.seed is None or _is_whole(self.seed), f"seed={self.seed!r} must be a whole number of 64 bits"),
            (-2 <= self.presence_penalty <= 2, f"presence_penalty={self.presence_penalty} must be -2 to 2"),
            (-2 <= self.frequency_penalty <= 2, f"frequency_penalty={self.frequency_penalty} must be -2 to 2"),
            (0 <= (self.top_logprobs or 0) <= 20, f"top_logprobs={self.top_logprobs} must be 0 to 20"),
        )
        return [*(fault for is_fine, fault in checks if not is_fine), *self.sampling.faults()]


def _is_whole(value: object, least: int = -(2**63), end: int = 2**64) -> bool:
    """Say whether ``value`` is a whole number in a range: as it stands what torch takes as a seed."""
    return isinstance(value, int) and least <= value < end


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to an answer.

    Attributes:
        text: new text; may be empty while a character or a stop string is incomplete.
        choices: new tokens, without an end token.
        finish: why the answer is over; None while it goes on.
        error: what failed, where ``finish`` is "error".
    """

    text: str
    choices: tuple[Choice, ...] = ()
    finish: Finish | None = None
    error: str | None = None
