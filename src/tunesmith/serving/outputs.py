"""What ``fast_generate`` is asked and what it answers, under vLLM's names, without vLLM in this environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tunesmith.core.errors import SettingsError

__all__ = ["CompletionOutput", "Logprob", "LoraRequest", "RequestOutput", "SamplingParams", "as_params", "output_of"]


@dataclass(slots=True)
class SamplingParams:
    """How answers are chosen and where they end: names, meanings and defaults of ``vllm.SamplingParams``.

    Attributes:
        n: answers to each prompt.
        temperature: 0 takes the likeliest token each time.
        top_k: 0 and -1 are off.
        max_tokens: of each answer; None: as many as the window has room for.
        min_tokens: before an end token or one of ``stop_token_ids`` may be chosen.
        stop: texts that end an answer, left out of it unless ``include_stop_str_in_output``.
        stop_token_ids: tokens that end an answer, beside the model's own.
        logprobs: likeliest tokens to report at each place, beside the chosen one; None reports nothing.
        ignore_eos: go on behind the end tokens of the model.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def body(self) -> dict[str, Any]:
        """Return the fields of a request; what is None is left out and means the same."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class LoraRequest:
    """The adapter in the folder ``lora_path``, as ``model.load_lora`` gives it and ``lora_request=`` takes it."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of a token; ``rank`` is None for a chosen one that is not among those asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One answer. ``finish_reason`` is "stop" or "length"; ``stop_reason`` the text or token that ended it."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    lora_request: Any = None

    def finished(self) -> bool:
        """Say whether the answer has ended, which all answers here have."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The answers to one prompt; ``prompt`` is None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    lora_request: Any = None


_NAMES = frozenset(entry.name for entry in fields(SamplingParams))
# Of vLLM's: derived from others, or about how answers come while they are written, which is not seen here.
_WITHOUT_EFFECT = {"output_kind", "output_text_buffer_length", "skip_clone", "stream_interval"}


def as_params(given: Any) -> SamplingParams:
    """Return ``given``, one of ours or of vLLM's, as one of ours; None stands for the defaults.

    Raises:
        SettingsError: it is neither, or something is set that is not passed on.
    """
    if given is None:
        return SamplingParams()
    if isinstance(given, SamplingParams):
        return given
    if not (hasattr(given, "max_tokens") and hasattr(given, "temperature")):
        raise SettingsError(
            f"sampling_params is a {type(given).__name__}. Give a tunesmith.SamplingParams, or one of vLLM's."
        )
    plain = type(given)()
    names = [name for name in getattr(given, "__struct_fields__", None) or vars(given) if not name.startswith("_")]
    # By their texts: some values are arrays, which == compares one by one.
    others = [name for name in names if repr(getattr(given, name)) != repr(getattr(plain, name, None))]
    unknown = sorted({*others} - _NAMES - _WITHOUT_EFFECT)
    if unknown:
        raise SettingsError(
            f"sampling_params.{unknown[0]}={getattr(given, unknown[0])!r} is not passed on to vLLM. Leave it out; "
            f"passed on are {', '.join(sorted(_NAMES))}."
        )
    return SamplingParams(**{name: getattr(given, name) for name in _NAMES if hasattr(given, name)})


def output_of(
    answer: dict[str, Any],
    *,
    number: int,
    prompt: str | None,
    ids: list[int],
    params: SamplingParams,
    request: Any,
    word: Callable[[int], str],
) -> RequestOutput:
    """Return what vLLM's HTTP ``answer`` to one prompt says; ``word`` writes a token."""
    outputs = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        found = choice.get("logprobs")
        places = None if found is None else _places(found, params.logprobs or 0, word)
        total = None if found is None else sum(found["token_logprobs"])
        outputs.append(CompletionOutput(choice["index"], choice["text"], choice["token_ids"], total, places,
                                        choice["finish_reason"], choice.get("stop_reason"), request))  # fmt: skip
    return RequestOutput(str(number), prompt, ids, outputs, lora_request=request)


def _places(found: dict[str, Any], asked: int, word: Callable[[int], str]) -> list[dict[int, Logprob]]:
    """Return token -> log-probability at each place of an answer, the likeliest first."""
    places = []
    for chosen, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        ranked = sorted(((value, _token(name)) for name, value in top.items()), reverse=True)
        # Behind those asked for stands the chosen one, at whatever rank.
        ranks = {token: rank for rank, (_, token) in enumerate(ranked, 1) if rank <= asked}
        place = {token: Logprob(value, ranks.get(token), word(token)) for value, token in ranked}
        place.setdefault(_token(chosen), Logprob(logprob, None, word(_token(chosen))))
        places.append(place)
    return places


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))
