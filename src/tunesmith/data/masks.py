"""From an understood row to documents: token ids, and which of them are trained.

    Conversation   rendered by the tokenizer's own chat template, in one piece; ``turns.py`` finds the answers in it
    Completion     prompt and completion joined and tokenized once; the completion and EOS are trained
    Text           every token; or, for text that a template has rendered before, the answers behind its markers

Trained characters become trained tokens by overlap with the tokens' character spans (``tokens.py``). Token ids decide
nothing here: in SmolLM2, for one, the BOS opens every turn, and padding, EOS and end of turn are the same token.

A conversation is one document as long as every answer stands in the full rendering exactly as in the rendering that
ends with it, which is the one the model meets at inference. Where the template renders older turns differently
(qwen3, gpt-oss), each answer becomes a document of its own that ends there, and the ledger counts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import SettingsError
from tunesmith.core.names import did_you_mean
from tunesmith.data.markers import Markers, find_answers, resolve_markers, response_mask
from tunesmith.data.templates import apply_template
from tunesmith.data.tokens import SpanTokenizer, TokenSpans, eos_text
from tunesmith.data.turns import ChatRenderer, Message, Turn, drops_a_message, special_token_in
from tunesmith.data.types import Completion, Conversation, Document, Example, RowRefusedError, Text, Tokens, TrainOn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CUT_TOKEN", "DROPS_MESSAGE", "SPLIT_BY_TURN", "ExampleEncoder"]

# Notes that a document can carry into the ledger, beside those of turns.py.
SPLIT_BY_TURN = "split by turn"
CUT_TOKEN = "token straddles the start of an answer"
DROPS_MESSAGE = "template drops a message or tool"
NO_EOS = "no EOS token"

# Every answer is rendered again with all that comes before it; beyond this many messages one row takes minutes.
_MOST_MESSAGES = 1000


@dataclass(frozen=True, slots=True)
class _Span:
    """Trained characters; ``is_closed`` if the last token among them ends an answer."""

    start: int
    end: int
    is_closed: bool


class ExampleEncoder:
    """Turns examples into documents for one tokenizer.

    Args:
        tokenizer: a fast tokenizer. Tokens added to it later are not seen.
        train_on: "assistant" (each answer), "last" (the last answer), "all" (every token but the first), or None for
            the default: "assistant" for conversations and completions, "all" for text. A message's own train flag
            goes before it: False leaves the message out, True trains its content whatever its role.
        chat_template: built-in name or file; set on ``tokenizer`` itself, so that it is saved with the model.
        instruction_part, response_part: markers for rendered text, in which only answers are then trained; without
            them, ``train_on="assistant"`` or ``"last"`` derives them from the chat template.

    Raises:
        ModelError: the tokenizer is slow, or lacks the tokens of ``chat_template``.
        SettingsError: unknown ``train_on`` or template, one marker without the other, or markers with "all".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_on: TrainOn | None = None,
        chat_template: str | None = None,
        instruction_part: str | None = None,
        response_part: str | None = None,
    ) -> None:
        _check_train_on(train_on, instruction_part, response_part)
        if chat_template is not None:
            apply_template(tokenizer, chat_template)
        self._tokenizer = tokenizer
        self._train_on: TrainOn | None = train_on
        self._tokens = SpanTokenizer(tokenizer)
        self._renderer = ChatRenderer(tokenizer)
        self._given_parts = (instruction_part, response_part)
        are_given = self._given_parts != (None, None)
        self._known_markers = resolve_markers(tokenizer, *self._given_parts) if are_given else None
        # Whoever names the markers wants the answers behind them.
        self._finds_answers_in_text = are_given or train_on in ("assistant", "last")

    def encode(self, example: Example) -> list[Document]:
        """Return the documents of one row; at least one.

        Raises:
            RowRefusedError: the row cannot be used; the ledger counts its reason.
            ModelError: the row is a conversation, or text to be searched for answers, and there is no chat template.
        """
        if isinstance(example, Conversation):
            if example.images:
                raise RowRefusedError(
                    "content is not text",
                    f"the row has {len(example.images)} images, and the tokenizer alone reads text. Load a "
                    "vision-language model with FastVisionModel and give its processor",
                )
            return self._encode_conversation(example)
        if isinstance(example, Tokens):
            return [self._mask_tokens(example)]
        if isinstance(example, Completion):
            return [self._encode_completion(example)]
        return [self._encode_text(example)]

    def render(self, conversation: Conversation) -> str:
        """Return the one full rendering of a conversation, as the chat template writes it."""
        return self._renderer.render(conversation.messages, conversation.tools)

    def prompt_text(self, messages: list[Message], tools: list[dict[str, object]] | None = None) -> str:
        """Return the text that the model is given when it is to answer ``messages``."""
        return self._renderer.render(messages, tools, generation_prompt=True)

    def check_inference_agreement(self, conversation: Conversation) -> list[str]:
        """Return a sentence for each trained answer whose inference prompt is not what it was trained behind.

        Compares token ids: those of the prompt followed by those of the answer must be those of the training text.
        """
        differences: list[str] = []
        for turn in self._trained_turns(conversation):
            if conversation.messages[turn.index]["role"] != "assistant":
                continue
            where = f"message {turn.index}"
            if turn.prompt is None:
                differences.append(f"{where}: there is no inference prompt before it")
                continue
            training = self._tokens.tokenize(turn.text)
            before = training.ids[: int(np.argmax(training.overlapping(turn.start, turn.end)))]
            prompt = self._tokens.tokenize(turn.prompt).ids
            if not np.array_equal(before, prompt):
                is_cut = training.is_cut_at(turn.start)
                differences.append(f"{where}: {_difference(turn, turn.prompt, is_cut)}")
        return differences

    # Conversations

    def _encode_conversation(self, conversation: Conversation) -> list[Document]:
        messages, tools = conversation.messages, conversation.tools
        whole = self._checked_rendering(conversation)
        notes = [DROPS_MESSAGE] if drops_a_message(messages, tools, whole) else []
        if self._train_on == "all":
            return [self._all_but_excluded(conversation, whole, notes)]
        turns = self._trained_turns(conversation)
        if all(whole.startswith(turn.text[: turn.end]) for turn in turns):
            notes += [note for turn in turns for note in turn.notes]
            return [
                self._document(whole, [_Span(t.start, t.end, t.is_closed) for t in turns], conversation.where, notes)
            ]
        if any(messages[turn.index]["role"] != "assistant" for turn in turns):
            raise RowRefusedError(
                "chat template is not stable",
                "the chat template renders older turns differently, so each answer needs a document of its own, in "
                "which a message of another role cannot be trained. Leave its train flag out",
            )
        return [
            self._document(
                turn.text,
                [_Span(turn.start, turn.end, turn.is_closed)],
                conversation.where,
                [*notes, *turn.notes, SPLIT_BY_TURN],
            )
            for turn in turns
        ]

    def _checked_rendering(self, conversation: Conversation) -> str:
        """Return the full rendering, unless the row is too long to look into or holds control tokens as text."""
        messages, tools = conversation.messages, conversation.tools
        if len(messages) > _MOST_MESSAGES:
            raise RowRefusedError(
                "too many messages",
                f"the conversation has {len(messages):,} messages, at most {_MOST_MESSAGES:,} are read. Split the row",
            )
        found = special_token_in([messages, tools or []], self._renderer.special)
        if found is not None:
            raise RowRefusedError(
                "special token in content",
                f"the row's own text holds {found!r}, which this tokenizer would read as a control token, not as text",
            )
        return self._renderer.render(messages, tools)

    def _trained_turns(self, conversation: Conversation) -> list[Turn]:
        """Locate each message that is trained, by its flag or else by ``train_on``.

        Raises:
            RowRefusedError: there is none.
        """
        messages, tools = conversation.messages, conversation.tools
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = set(answers[-1:] if self._train_on == "last" else answers)
        turns: list[Turn] = []
        for index, flag in enumerate(conversation.train):
            if flag is False or (flag is None and index not in chosen):
                continue
            locate = self._renderer.locate_answer if index in answers else self._renderer.locate_content
            turns.append(locate(messages, index, tools))
        if not turns:
            reason = "no assistant turn" if not answers else "no trained turn"
            raise RowRefusedError(reason, f"{reason}: nothing in this conversation is to be trained")
        return turns

    def _all_but_excluded(self, conversation: Conversation, whole: str, notes: list[str]) -> Document:
        """Train every token of the full rendering but those of messages whose flag is False."""
        messages, tools = conversation.messages, conversation.tools
        tokens = self._tokens.tokenize(whole)
        trained = np.ones(len(tokens.ids), dtype=np.bool_)
        ends: list[int] = []
        for index, (message, flag) in enumerate(zip(messages, conversation.train, strict=True)):
            is_answer = message["role"] == "assistant"
            if flag is False:
                locate = self._renderer.locate_answer if is_answer else self._renderer.locate_content
                turn = locate(messages, index, tools)
                if not whole.startswith(turn.text[: turn.end]):
                    raise RowRefusedError(
                        "chat template is not stable",
                        f"message {index} is not to be trained, but the chat template renders it differently in the "
                        "full conversation, so it cannot be left out of train_on='all'",
                    )
                trained &= ~tokens.overlapping(turn.start, turn.end)
            elif is_answer:
                closed_at = self._renderer.end_of_answer_in(whole, messages, index, tools)
                if closed_at is not None:
                    ends.append(int(np.flatnonzero(tokens.overlapping(closed_at - 1, closed_at))[-1]))
        trained[:1] = False
        return self._finish(tokens, trained, conversation.where, ends, notes)

    # Plain text

    def _encode_completion(self, example: Completion) -> Document:
        if not example.completion.strip():
            raise RowRefusedError("empty completion", "the completion is empty: there is nothing to train on")
        text, end_of_eos = self._with_eos(example.prompt + example.completion)
        tokens = self._tokens.with_default_start(self._tokens.tokenize(text))
        notes = [NO_EOS] if end_of_eos is None else []
        if self._train_on == "all":
            return _everything(tokens, example.where, notes)
        span = _Span(len(example.prompt), end_of_eos or len(text), end_of_eos is not None)
        return self._document_of(tokens, [span], example.where, notes)

    def _encode_text(self, example: Text) -> Document:
        if not example.text.strip():
            raise RowRefusedError("empty text", "the text is empty: there is nothing to train on")
        if self._finds_answers_in_text:
            return self._encode_rendered_text(example)
        text, end_of_eos = self._with_eos(example.text)
        tokens = self._tokens.with_default_start(self._tokens.tokenize(text))
        return _everything(tokens, example.where, [NO_EOS] if end_of_eos is None else [])

    def _encode_rendered_text(self, example: Text) -> Document:
        """Train the answers that stand behind the markers, as the conversation itself would be trained."""
        markers = self._markers()
        text, eos = example.text, eos_text(self._tokenizer)
        if eos in markers.ends and not find_answers(text, markers, may_end_open=True)[-1].is_closed:
            text += eos
        answers = find_answers(text, markers)
        tokens = self._tokens.tokenize(text)
        if markers.starts_with_bos is not False:
            tokens = self._tokens.with_default_start(tokens)
        spans = [_Span(answer.start, answer.end, answer.is_closed) for answer in answers]
        return self._document_of(tokens, spans[-1:] if self._train_on == "last" else spans, example.where, [])

    def _mask_tokens(self, example: Tokens) -> Document:
        """Keep the row's own mask; where it has none and answers are asked for, find them by the markers."""
        trained = example.trained
        if self._finds_answers_in_text and trained.all():
            is_last = self._train_on == "last"
            trained = response_mask(example.input_ids, self._tokenizer, self._markers(), last_only=is_last)
        return Document(example.input_ids, trained, example.where)

    def _markers(self) -> Markers:
        """Derive the markers when the first text needs them: other rows do not need a chat template."""
        if self._known_markers is None:
            self._known_markers = resolve_markers(self._tokenizer, *self._given_parts)
        return self._known_markers

    def _with_eos(self, text: str) -> tuple[str, int | None]:
        """Return the text with EOS behind it, unless it is there already, and where EOS ends; None if there is none."""
        eos = eos_text(self._tokenizer)
        if not eos:
            return text, None
        if not text.rstrip().endswith(eos):
            text += eos
        return text, len(text.rstrip())

    # Spans to tokens

    def _document(self, text: str, spans: Sequence[_Span], where: str, notes: Sequence[str]) -> Document:
        return self._document_of(self._tokens.tokenize(text), spans, where, notes)

    def _document_of(self, tokens: TokenSpans, spans: Sequence[_Span], where: str, notes: Sequence[str]) -> Document:
        """Train the tokens that overlap a span; the first token never, since nothing comes before it."""
        trained = np.zeros(len(tokens.ids), dtype=np.bool_)
        ends: list[int] = []
        kinds = dict.fromkeys(notes)
        for span in spans:
            inside = tokens.overlapping(span.start, span.end)
            trained |= inside
            if span.is_closed:
                ends.append(int(np.flatnonzero(inside)[-1]))
            if tokens.is_cut_at(span.start):
                kinds[CUT_TOKEN] = None
        trained[:1] = False
        return self._finish(tokens, trained, where, ends, kinds)

    def _finish(
        self, tokens: TokenSpans, trained: NDArray[np.bool_], where: str, ends: Sequence[int], notes: Iterable[str]
    ) -> Document:
        if not trained.any():
            raise RowRefusedError("nothing to train on", "no token of this row is to be trained")
        return Document(tokens.ids, trained, where, tuple(ends), tuple(dict.fromkeys(notes)))


def _check_train_on(train_on: str | None, *markers: str | None) -> None:
    known = get_args(TrainOn)
    if train_on is not None and train_on not in known:
        raise SettingsError(
            f"train_on={train_on!r} is none of {', '.join(map(repr, known))}.{did_you_mean(str(train_on), known)}"
        )
    if train_on == "all" and any(markers):
        raise SettingsError(
            "train_on='all' trains every token, but instruction_part and response_part pick out answers. Give one or "
            "the other: train_on='assistant' or 'last' goes with markers."
        )


def _everything(tokens: TokenSpans, where: str, notes: Sequence[str]) -> Document:
    trained = np.ones(len(tokens.ids), dtype=np.bool_)
    trained[:1] = False
    if not trained.any():
        raise RowRefusedError("nothing to train on", "the text is a single token, with nothing before it")
    return Document(tokens.ids, trained, where, (), tuple(notes))


def _difference(turn: Turn, prompt: str, is_cut: bool) -> str:
    """Say how the tokens ahead of an answer differ from those of its inference prompt."""
    if turn.text[: turn.start] != prompt:
        extra = prompt[turn.start :] or prompt[-40:]
        return f"the inference prompt ends with {extra!r}, which the training text does not have before the answer"
    if is_cut:
        around = turn.text[max(0, turn.start - 10) : turn.start + 10]
        return f"the end of the prompt and the start of the answer share a token in training, in {around!r}"
    return f"the end of the prompt, {prompt[-20:]!r}, tokenizes differently where nothing follows it"
