"""Text to token ids with the exact characters behind every token.

Masks are decided on text and carried over to tokens here, so these spans must be right. Three things would spoil
them, and are undone:

- Byte-level post-processors trim white space off the spans ("\n\n " is reported as "\n", "\n" as nothing). The ids
  do not depend on that step, so a private copy of the tokenizer's backend runs without it.
- An added token with ``rstrip`` (Phi-3) swallows the white space after it, even the start of an answer. Its span is
  narrowed to its own literal.
- One character may be several tokens (emoji, byte fallback) and a token may be no character (the "▁" that
  SentencePiece puts in front). The first all share the character; the second stands for the place it is put at.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import ModelError
from tunesmith.data.types import RowRefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SpanTokenizer", "TokenSpans", "bos_text", "eos_text", "special_token_pattern"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenSpans:
    """Token ids (T,) and, for each, the half-open range of characters it stands for; (-1, -1) where it has none."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def overlapping(self, start: int, end: int) -> NDArray[np.bool_]:
        """Return (T,) bool: tokens that share at least one character with ``[start, end)``.

        A token of no width counts as the character it stands before.
        """
        ends = np.maximum(self.ends, self.starts + 1)
        return (self.starts >= 0) & (self.starts < end) & (ends > start)

    def is_cut_at(self, position: int) -> bool:
        """Return whether ``position`` lies inside a token, so that text before and after it tokenizes differently."""
        return bool(np.any((self.starts < position) & (position < self.ends)))

    def after(self, prefix: NDArray[np.int32]) -> TokenSpans:
        """Return these tokens behind ``prefix``, which stands for no characters."""
        nowhere = np.full(len(prefix), -1, dtype=np.int64)
        return TokenSpans(
            np.concatenate([prefix, self.ids]),
            np.concatenate([nowhere, self.starts]),
            np.concatenate([nowhere, self.ends]),
        )


class SpanTokenizer:
    """A tokenizer that never adds, cuts or pads anything, and knows the characters of every token.

    The tokenizer given is copied as it is now; tokens added to it later are not seen.

    Args:
        tokenizer: any fast tokenizer.

    Raises:
        ModelError: the tokenizer is a slow one, which has no character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer without character offsets, so it cannot be told which "
                "tokens are an answer. Load the model with a fast tokenizer (a folder that holds tokenizer.json)."
            )
        self._backend: Any = copy.deepcopy(cast("Any", tokenizer).backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.post_processor = None
        self._literals = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        self._default_prefix = _default_prefix(tokenizer)

    def tokenize(self, text: str) -> TokenSpans:
        """Return the tokens of ``text`` as it stands, without any token added.

        Raises:
            RowRefusedError: the text holds half of a surrogate pair, which no tokenizer can read.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            place = f"{text[error.start : error.end]!r} at character {error.start}"
            raise RowRefusedError("invalid Unicode", f"the text holds {place}, which is not valid Unicode") from error
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, dtype=np.int32)
        spans = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = spans[:, 0].copy(), spans[:, 1].copy()
        for position, token in enumerate(encoding.ids):
            literal = self._literals.get(token)
            if literal is not None and ends[position] - starts[position] > len(literal):
                found = text.find(literal, starts[position], ends[position])
                if found >= 0:
                    starts[position], ends[position] = found, found + len(literal)
        return TokenSpans(ids, starts, ends)

    def with_default_start(self, tokens: TokenSpans) -> TokenSpans:
        """Put the tokens in front that the tokenizer adds by default (BOS, or none), unless they are there already."""
        size = len(self._default_prefix)
        if size == 0 or np.array_equal(tokens.ids[:size], self._default_prefix):
            return tokens
        return tokens.after(self._default_prefix)


def bos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the BOS token as text; empty if the tokenizer has none."""
    return str(cast("Any", tokenizer).bos_token or "")


def eos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the EOS token as text; empty if the tokenizer has none."""
    return str(cast("Any", tokenizer).eos_token or "")


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that matches every special token of the tokenizer written out as text, longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(str(token) for token in tokenizer.all_special_tokens)
    special.discard("")
    if not special:
        return re.compile(r"(?!)")
    return re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))


def _default_prefix(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int32]:
    """Return the ids that the tokenizer puts in front of any text by default."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return np.asarray(full[:start], dtype=np.int32)
    return np.zeros(0, dtype=np.int32)
