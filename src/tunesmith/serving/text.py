"""The text of an answer while its tokens come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_CONTEXT = 8  # tokens of a prompt: the first of them may be half a character or lose its space, the last may not
_PARTIAL = "\ufffd"  # what a decoder gives for bytes that are no character yet


class TextStream:
    """Turns tokens into text.

    A token may hold a part of a character, and some tokenizers write a space only between two tokens. So the newest
    tokens are decoded together with some before them, and given out once they are whole.

    Args:
        prompt: the tokens that the text goes on from, where it does not begin anew.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._tokens = list(prompt[-_CONTEXT:])
        if self._decode(self._tokens).endswith(_PARTIAL):
            self._tokens = []
        # Tokens [context, read) were given out, or are of the prompt, and are decoded again for their spaces.
        self._context, self._read = 0, len(self._tokens)
        self._waiting = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Return the text that is certain now; after a stop string nothing more."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._read])
        after = self._decode(self._tokens[self._context :])
        if after.endswith(_PARTIAL) or len(after) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._pass_on(after[len(before) :])

    def end(self) -> str:
        """Return what was held back, when no token will come."""
        if self.is_stopped:
            return ""
        before = self._decode(self._tokens[self._context : self._read])
        rest = self._decode(self._tokens[self._context :])[len(before) :]
        self._context = self._read = len(self._tokens)
        text = self._pass_on(rest)
        if not self.is_stopped:
            text, self._waiting = text + self._waiting, ""
        return text

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _pass_on(self, new: str) -> str:
        """Return what can be given out of the text that waits and the new one."""
        text = self._waiting + new
        ends = [at for at in map(text.find, self._stops) if at >= 0]
        if ends:
            self.is_stopped, self._waiting = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
