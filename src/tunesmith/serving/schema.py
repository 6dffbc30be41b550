"""What a client may ask, in the words of OpenAI's API, and the errors that it gets.

Every field is applied or refused. A field of OpenAI's that this server does not do is allowed as long as it holds the
value that changes nothing; with any other value it is refused with the reason. An unknown field is refused with the
nearest known one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import from_json

from tunesmith.core.names import did_you_mean
from tunesmith.models.sampling import Sampling

__all__ = [
    "NAME_PATTERN",
    "ApiError",
    "ChatRequest",
    "CompletionRequest",
    "LoadAdapter",
    "TextRequest",
    "UnloadAdapter",
    "parse",
]

NAME_PATTERN = r"[A-Za-z0-9._:-]{1,128}"
"""What the name of an adapter looks like."""


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form.

    Args:
        param: the field that is at fault.
        code: a short word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class StreamOptions(_Body):
    """How a stream ends."""

    include_usage: bool = False
    """Whether a last part tells the numbers of tokens."""
    include_obfuscation: Literal[False] = False


Text = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TextRequest(_Body):
    """What requests for text have in common."""

    model: str
    """The served name of the base, or the name of an adapter."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer; none: as long as the server allows."""
    n: Annotated[int, Field(ge=1, le=128)] = 1
    """Answers to each prompt."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] = Field(default_factory=list)
    """Strings that end the answer and are no part of it."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    """Draw from so many of the likeliest tokens; 0 or -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    ignore_eos: bool = False
    """Go on after an end token, to measure."""
    user: str | None = None
    """A mark of the client's own; it changes no answer."""

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> TextRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_p, max(self.top_k, 0), self.min_p, self.repetition_penalty)

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings of ``stop``."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def logprobs_wanted(self) -> int | None:
        """Likeliest tokens to report with each token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def has_usage_part(self) -> bool:
        """Whether a stream tells the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    """Text, or parts of text, which are joined by line ends."""

    @property
    def plain(self) -> dict[str, str]:
        """The message as chat templates take it; they know the developer's as the system's."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(TextRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of ``max_tokens``."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one setting: give one")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    @property
    def logprobs_wanted(self) -> int | None:
        """See :class:`TextRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(TextRequest):
    """``POST /v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    """A text, token ids, or several of one kind."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Likeliest tokens to report with each token."""

    @property
    def logprobs_wanted(self) -> int | None:
        """See :class:`TextRequest`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]  # type: ignore[list-item,return-value]


class UnloadAdapter(_Body):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: str


class LoadAdapter(_Body):
    """``POST /v1/load_lora_adapter``."""

    lora_name: Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN}$")]
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    load_inplace: bool = False
    """Whether an adapter of that name is replaced."""


_TOOLS = "this server calls no tools"
_SOUND = "answers are text"
_PLACE = "it belongs to another server"
# Field -> the values that change nothing, and why no other is taken. Null always is one.
_BOTH: dict[str, tuple[tuple[Any, ...], str]] = {
    "logit_bias": (({},), "scores of single tokens are not changed"),
}
_CHAT: dict[str, tuple[tuple[Any, ...], str]] = {
    **_BOTH,
    "audio": ((), _SOUND),
    "function_call": (("none",), _TOOLS),
    "functions": (([],), _TOOLS),
    "modalities": ((["text"],), _SOUND),
    "moderation": ((), _PLACE),
    "parallel_tool_calls": ((True, False), _TOOLS),
    "prediction": ((), "answers are written token by token"),
    "prompt_cache_options": ((), "no prompts are kept"),
    "prompt_cache_retention": ((), "no prompts are kept"),
    "reasoning_effort": ((), "how long a model thinks is up to its template"),
    "response_format": (({"type": "text"},), "answers are not held to a format; train one, or ask for it"),
    "service_tier": (("auto", "default"), _PLACE),
    "store": ((False,), "answers are not kept"),
    "tool_choice": (("none",), _TOOLS),
    "tools": (([],), _TOOLS),
    "verbosity": (("medium",), "how much a model says is up to its training"),
    "web_search_options": ((), _PLACE),
}
_COMPLETION: dict[str, tuple[tuple[Any, ...], str]] = {
    **_BOTH,
    "best_of": ((1,), "answers are not ranked; ask for n and choose"),
    "echo": ((False,), "the prompt is not repeated"),
    "suffix": (("",), "text is written forward only"),
}
_MESSAGE: dict[str, tuple[tuple[Any, ...], str]] = {
    "annotations": (([],), "templates have no place for it"),
    "audio": ((), _SOUND),
    "function_call": ((), _TOOLS),
    "name": ((), "templates have no place for it; write it into the content"),
    "refusal": ((), "templates have no place for it"),
    "tool_call_id": ((), _TOOLS),
    "tool_calls": (([],), _TOOLS),
}
_NOT_DONE: dict[type[_Body], dict[str, tuple[tuple[Any, ...], str]]] = {
    ChatRequest: _CHAT,
    CompletionRequest: _COMPLETION,
}

B = TypeVar("B", bound=_Body)


def parse(kind: type[B], body: bytes) -> B:
    """Return the request that ``body`` holds.

    Raises:
        ApiError: 400; it is no JSON object, or a field is unknown, not done here, missing or out of its range.
    """
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object.", code="invalid_json")
    values = _without_neutral(values, kind, _NOT_DONE.get(kind, {}))
    if kind is ChatRequest and isinstance(values.get("messages"), list):
        values["messages"] = [
            _without_neutral(message, Message, _MESSAGE, f"messages[{index}].")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(values["messages"])
        ]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _complaint(kind, error) from None


def _without_neutral(
    values: Mapping[str, Any], kind: type[_Body], not_done: Mapping[str, tuple[tuple[Any, ...], str]], where: str = ""
) -> dict[str, Any]:
    """Return the fields that say something: null means the default, and what is not done may hold it."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in not_done:
            neutral, why = not_done[name]
            if value is not None and value not in neutral:
                message = f"{where}{name} is not supported: {why}. Leave it out."
                raise ApiError(400, message, param=f"{where}{name}", code="unsupported_parameter")
        elif name not in kind.model_fields:
            near = did_you_mean(name, kind.model_fields)
            raise ApiError(400, f"unknown field {where}{name}.{near}", param=f"{where}{name}", code="unknown_parameter")
        elif value is not None or kind.model_fields[name].is_required():
            kept[name] = value
    return kept


def _complaint(kind: type[_Body], error: ValidationError) -> ApiError:
    """Return the error for the first field that is wrong; of a union the form that came nearest says what is."""
    found = error.errors(include_url=False)
    first = next((problem for problem in found if problem["type"] != "string_type"), found[0])
    at = [part for part in first["loc"] if isinstance(part, int) or _is_field(part)]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).lstrip(".")
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param}.", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing.", param=param, code="missing_required_parameter")
    if first["type"] == "list_type" and found[0]["type"] == "string_type":
        reason = "Input should be a text or a list"
    return ApiError(400, f"{param}: {reason}." if param else f"{reason}.", param=param or None, code="invalid_value")


def _is_field(part: str) -> bool:
    """Say whether a part of pydantic's path is the name of a field, not that of a form of a union."""
    return part.isidentifier() and part not in ("str", "list", "int")
