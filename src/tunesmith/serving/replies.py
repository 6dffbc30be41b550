"""What a client gets, in the form of OpenAI's API: whole answers, parts of a stream, log-probabilities, numbers."""

from __future__ import annotations

import json
import time
import uuid
from codecs import getincrementaldecoder
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.serving.answers import Answer, Answers
from tunesmith.serving.choose import Choice
from tunesmith.serving.schema import ApiError

__all__ = ["ChatReply", "CompletionReply", "TokenNames"]

_LEAST = -9999.0
"""Stands for the log-probability of what is impossible: JSON has no infinity."""


class TokenNames:
    """The text and the bytes of single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def of(self, token: int) -> tuple[str, list[int]]:
        """Return the text of a token as it stands inside a text, and its bytes; half a character has only bytes."""
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def is_shown(self, token: int) -> bool:
        """Say whether a token is in the text of an answer, which special ones are not."""
        return self._tokenizer.decode([token, token], skip_special_tokens=True) != ""

    def _look_up(self, token: int) -> tuple[str, list[int]]:
        written = self._tokenizer.convert_ids_to_tokens(token)
        if written is None:  # a row of the embedding that stands for nothing
            return "", []
        if token in self._tokenizer.all_special_ids:
            return written, list(written.encode())
        # Some tokenizers drop the space before the first token of a text.
        text = self._decode([token, token])[len(self._decode([token])) :]
        own = _bytes_of(written) if "\ufffd" in text else None
        return text, list(text.encode()) if own is None else own

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def _bytes_of(written: str) -> list[int] | None:
    """Return the bytes that a part of a character stands for, in the two ways in which vocabularies write them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if written.startswith("<0x") and written.endswith(">") and len(written) == 6:
        return [int(written[3:5], 16)]
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return [byte_of[letter] for letter in written] if set(written) <= set(byte_of) else None


@dataclass(slots=True)
class _Reply:
    """One HTTP request's answers in OpenAI's form.

    Attributes:
        model: the name that was asked for.
        names: of tokens, where log-probabilities are wanted; else None.
        prompt_tokens: of all prompts together, each counted once.
        has_usage: whether a stream ends with the numbers of tokens.
    """

    model: str
    names: TokenNames | None
    prompt_tokens: int
    has_usage: bool = False
    id: str = field(init=False)
    created: int = field(init=False, default_factory=lambda: int(time.time()))

    _prefix = ""
    _object = ""
    _part_object = ""

    def __post_init__(self) -> None:
        self.id = f"{self._prefix}-{uuid.uuid4().hex}"

    def whole(self, answers: Sequence[Answer], answer_tokens: int) -> dict[str, Any]:
        """Return the body for whole answers."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head(self._object), "choices": choices, "usage": self._usage(answer_tokens)}

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Yield the events of a stream; an error ends it as an event of its own."""
        for index in range(len(answers.requests)):
            for choice in self._first(index):
                yield self._event([choice])
        try:
            async for index, delta in answers.parts():
                logprobs = self._logprobs(index, delta.choices)
                if delta.text or logprobs is not None:
                    yield self._event([self._part(index, delta.text, logprobs)])
                if delta.finish is not None:
                    yield self._event([self._part(index, "", None, delta.finish)])
        except ApiError as error:
            yield _sse(error.body)
            return
        if self.has_usage:
            yield self._event([], self._usage(answers.answer_tokens))
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _usage(self, answer_tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + answer_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": answer_tokens, "total_tokens": total}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        event = {**self._head(self._part_object), "choices": choices}
        return _sse({**event, "usage": usage} if self.has_usage else event)

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _first(self, index: int) -> list[dict[str, Any]]:
        """Return what stands before the first part of an answer."""
        raise NotImplementedError

    def _part(self, index: int, text: str, logprobs: Any, finish: str | None = None) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, index: int, choices: Sequence[Choice]) -> dict[str, Any] | None:
        raise NotImplementedError


class ChatReply(_Reply):
    """Answers of ``/v1/chat/completions``."""

    _prefix, _object, _part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = self._logprobs(index, answer.choices)
        if self.names is not None:
            logprobs = logprobs or {"content": [], "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}

    def _first(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def _part(self, index: int, text: str, logprobs: Any, finish: str | None = None) -> dict[str, Any]:
        delta = {"content": text} if finish is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if self.names is None or not choices:
            return None
        content = [
            {**self._token(choice.token, choice.logprob), "top_logprobs": [self._token(*pair) for pair in choice.top]}
            for choice in choices
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        assert self.names is not None
        text, own = self.names.of(token)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": own}


class CompletionReply(_Reply):
    """Answers of ``/v1/completions``."""

    _prefix, _object, _part_object = "cmpl", "text_completion", "text_completion"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._places: defaultdict[int, _Place] = defaultdict(_Place)

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        logprobs = self._logprobs(index, answer.choices)
        if self.names is not None:
            logprobs = logprobs or {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        return self._part(index, answer.text, logprobs, answer.finish)

    def _first(self, index: int) -> list[dict[str, Any]]:
        return []

    def _part(self, index: int, text: str, logprobs: Any, finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, choices: Sequence[Choice]) -> dict[str, Any] | None:
        """Return the older form: lists side by side, and where in the answer each token begins."""
        if self.names is None or not choices:
            return None
        place, offsets, tops = self._places[index], [], []
        for choice in choices:
            pairs = [*choice.top, (choice.token, choice.logprob)]
            tops.append({self._name(token): max(logprob, _LEAST) for token, logprob in pairs})
            offsets.append(place.offset)
            if self.names.is_shown(choice.token):
                place.pass_on(self.names.of(choice.token)[1])
        tokens = [self._name(choice.token) for choice in choices]
        logprobs = [max(choice.logprob, _LEAST) for choice in choices]
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, token: int) -> str:
        """Return the text of a token; the halves of characters, which all would read alike, by their bytes."""
        assert self.names is not None
        text, own = self.names.of(token)
        return text if own == list(text.encode()) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


class _Place:
    """How many characters of an answer are whole after the tokens so far."""

    def __init__(self) -> None:
        self.offset = 0
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def pass_on(self, own: list[int]) -> None:
        """Go on by the bytes of a token."""
        self.offset += len(self._decoder.decode(bytes(own)))


def _sse(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
