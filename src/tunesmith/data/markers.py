"""Answers in text that a chat template has rendered before: found between markers.

A ``text`` row holds no messages any more, only what a template made of them. The markers are what the template writes
before a user's message (instruction part) and before an answer (response part); they are derived by rendering
sentinel messages, or given. An answer runs from behind a response marker to the end of its turn, which must come
before the next marker. A row where that does not hold is refused with the reason.

The same search serves token ids: :func:`response_mask` runs it over the tokens' own spelling ("Ġthe", "▁the",
"<|im_end|>"), in which every token has an exact place and nothing has to be decoded or tokenized again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.data.templates import BUILT_IN_TEMPLATES
from tunesmith.data.tokens import bos_text, eos_text
from tunesmith.data.turns import ChatRenderer, Message, Turn
from tunesmith.data.types import RowRefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "Markers", "derive_markers", "find_answers", "resolve_markers", "response_mask"]

_FIRST_QUESTION, _FIRST_ANSWER = "sentinelquestionone", "sentinelanswerone"
_SECOND_QUESTION, _SECOND_ANSWER = "sentinelquestiontwo", "sentinelanswertwo"

_GIVE_BOTH = "Pass both instruction_part= and response_part=, as they stand in the text."


@dataclass(frozen=True, slots=True)
class Markers:
    """What stands around the answers of a rendered conversation.

    Attributes:
        instruction_part: what opens a user's message; an answer cannot run past it.
        response_part: what opens an answer.
        ends: texts that can close an answer; the first that comes closes it.
        starts_with_bos: the template writes the BOS token first; None where there is no template to ask.
    """

    instruction_part: str
    response_part: str
    ends: tuple[str, ...]
    starts_with_bos: bool | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Characters ``[start, end)`` of a text are an answer; ``is_closed`` if its end-of-turn text is among them."""

    start: int
    end: int
    is_closed: bool


def derive_markers(tokenizer: PreTrainedTokenizerBase) -> Markers:
    """Return the markers of the tokenizer's chat template.

    Raises:
        ModelError: no chat template, or one from which no markers can be read; then both parts must be given.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "The tokenizer has no chat template, so it is not known what opens an answer in rendered text. "
            f"{_GIVE_BOTH} Or pass chat_template= with the template that rendered it ({', '.join(BUILT_IN_TEMPLATES)}, "
            "or a file)."
        )
    renderer = ChatRenderer(tokenizer)
    messages: list[Message] = [
        {"role": "user", "content": _FIRST_QUESTION},
        {"role": "assistant", "content": _FIRST_ANSWER},
        {"role": "user", "content": _SECOND_QUESTION},
        {"role": "assistant", "content": _SECOND_ANSWER},
    ]
    try:
        first, second = renderer.locate_answer(messages, 1), renderer.locate_answer(messages, 3)
        response_part = _response_part(renderer, messages, first)
    except RowRefusedError as refusal:
        raise ModelError(f"No markers can be derived from the chat template: {refusal}. {_GIVE_BOTH}") from refusal
    closing = _closing(first, _FIRST_ANSWER)
    between = second.text.partition(_FIRST_ANSWER)[2].partition(_SECOND_QUESTION)[0]
    if closing and between.startswith(closing):
        ends = [closing]
    else:  # an older turn is closed by another token than the last one (gpt-oss)
        special = renderer.special.match(between)
        ends = [closing, special.group() if special else ""]
    instruction_part = between.removeprefix(ends[-1]).lstrip().rstrip(" ")
    ends = tuple(dict.fromkeys(end for end in ends if end))
    if not (instruction_part and response_part and ends):
        raise ModelError(f"The chat template writes no marker between a question and its answer. {_GIVE_BOTH}")
    bos = bos_text(tokenizer)
    return Markers(instruction_part, response_part, ends, bool(bos) and second.text.startswith(bos))


def resolve_markers(
    tokenizer: PreTrainedTokenizerBase, instruction_part: str | None = None, response_part: str | None = None
) -> Markers:
    """Return the given markers, or those of the chat template if neither is given.

    With given markers an answer ends at the template's end of turn or, without a template, at EOS.

    Raises:
        SettingsError: one part is given without the other, or a part is empty.
        ModelError: none is given and none can be derived; or there is neither a template nor EOS.
    """
    if instruction_part is None and response_part is None:
        return derive_markers(tokenizer)
    if not instruction_part or not response_part:
        raise SettingsError(
            f"instruction_part={instruction_part!r} and response_part={response_part!r}: give both, as text "
            "that is not empty, or none. Without them the markers are derived from the tokenizer's chat template."
        )
    if tokenizer.chat_template:
        derived = derive_markers(tokenizer)
        return Markers(instruction_part, response_part, derived.ends, derived.starts_with_bos)
    eos = eos_text(tokenizer)
    if not eos:
        raise ModelError("The tokenizer has neither a chat template nor an EOS token, so no answer could ever end.")
    return Markers(instruction_part, response_part, (eos,))


def find_answers(text: str, markers: Markers, *, may_end_open: bool = False) -> list[Answer]:
    """Return the answers of a rendered conversation, in order; at least one.

    Args:
        text: the rendered conversation.
        markers: see :class:`Markers`.
        may_end_open: the last answer may run to the end of the text, as in a text that was cut.

    Raises:
        RowRefusedError: no response marker has an answer behind it, or an answer has no end before the next marker.
    """
    answers: list[Answer] = []
    position = 0
    while (found := text.find(markers.response_part, position)) >= 0:
        start = found + len(markers.response_part)
        end = _first_end(text, start, markers.ends)
        next_marker = _first_of(text, start, (markers.instruction_part, markers.response_part))
        if end is not None and (next_marker is None or end <= next_marker):
            answers.append(Answer(start, end, True))
        elif next_marker is None and not text[start:].strip():
            break  # a question that nobody answered, or a generation prompt
        elif next_marker is None and may_end_open:
            answers.append(Answer(start, len(text), False))
        else:
            raise RowRefusedError(
                "end of turn not found",
                f"the answer at character {start} is not closed by {' or '.join(map(repr, markers.ends))} before "
                f"{'the end of the text' if next_marker is None else 'the next marker'}",
            )
        position = answers[-1].end
    if not answers:
        raise RowRefusedError(
            "response marker not found",
            f"the text holds no {markers.response_part!r} with an answer behind it",
        )
    return answers


def response_mask(
    input_ids: Sequence[int] | NDArray[np.integer],
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
    *,
    last_only: bool = False,
) -> NDArray[np.bool_]:
    """Return (T,) bool for ids that were rendered and tokenized before: True where a token belongs to an answer.

    Equals what :class:`~tunesmith.data.masks.ExampleEncoder` trains for the same text. Ids that were cut at the end
    train the part of the last answer that is left.

    Args:
        input_ids: (T,) token ids of one document.
        tokenizer: the one that made them.
        markers: from :func:`resolve_markers`.
        last_only: only the last answer.

    Raises:
        RowRefusedError: as :func:`find_answers`; the row should then not be trained on.
    """
    convert = cast("Any", tokenizer).convert_ids_to_tokens
    # None for an id between the tokenizer's last and the model's last.
    spelled: list[str] = [token or "" for token in convert([int(index) for index in input_ids])]
    in_tokens = Markers(
        _spell(tokenizer, markers.instruction_part),
        _spell(tokenizer, markers.response_part),
        tuple(_spell(tokenizer, end) for end in markers.ends),
    )
    answers = find_answers("".join(spelled), in_tokens, may_end_open=True)
    sizes = np.fromiter(map(len, spelled), dtype=np.int64, count=len(spelled))
    ends = np.cumsum(sizes)
    starts = ends - sizes
    mask = np.zeros(len(spelled), dtype=np.bool_)
    for answer in answers[-1:] if last_only else answers:
        mask |= (starts < answer.end) & (ends > answer.start)
    mask[:1] = False
    return mask


def _response_part(renderer: ChatRenderer, messages: list[Message], first: Turn) -> str:
    """Return what opens an answer: as much of what the generation prompt adds as every answer has before it.

    Where that is nothing (Mistral), all that stands between question and answer.
    """
    question, prompt = renderer.render(messages[:1]), renderer.render(messages[:1], generation_prompt=True)
    between = renderer.render(messages).partition(_FIRST_QUESTION)[2].partition(_FIRST_ANSWER)[0]
    added = prompt[len(question) :] if prompt.startswith(question) else ""
    if added and added in between:
        return added
    # A prompt that opens a think block, which older answers do not have, is shared up to there.
    shared = (added[:size] for size in range(len(added), 0, -1) if between.endswith(added[:size]))
    return next(shared, first.text[: first.start].partition(_FIRST_QUESTION)[2])


def _closing(turn: Turn, answer: str) -> str:
    """Return what closes a located turn: its text behind the answer itself; empty if nothing does."""
    return turn.text[: turn.end].rpartition(answer)[2].strip() if turn.is_closed else ""


def _first_of(text: str, start: int, wanted: Sequence[str]) -> int | None:
    """Return where the earliest of ``wanted`` begins at or after ``start``."""
    return min((at for at in (text.find(entry, start) for entry in wanted) if at >= 0), default=None)


def _first_end(text: str, start: int, ends: Sequence[str]) -> int | None:
    """Return the position behind the end text that comes first at or after ``start``."""
    found = [(at, at + len(end)) for end in ends if (at := text.find(end, start)) >= 0]
    return min(found)[1] if found else None


def _spell(tokenizer: PreTrainedTokenizerBase, marker: str) -> str:
    """Return ``marker`` in the spelling of the tokenizer's tokens, as it stands in the middle of a text."""
    ids: list[int] = tokenizer(marker, add_special_tokens=False)["input_ids"]
    spelled = "".join(cast("Any", tokenizer).convert_ids_to_tokens(ids))
    return spelled if marker.startswith(" ") else spelled.removeprefix("▁")
