"""Prompts as token ids, and the tokens that end an answer to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import EvaluationError
from tunesmith.data.turns import ChatRenderer
from tunesmith.data.types import RowRefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Prompt", "encode_prompt", "is_chat", "refuse_one_prompt", "require_prompt", "stop_token_ids"]

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""Plain text, chat messages up to the turn to be answered, or token ids."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Return the token ids of ``prompt``: plain text with the tokenizer's own BOS, messages as the template renders.

    A BOS in a rendered conversation comes from the template alone, never a second one from the tokenizer.

    Raises:
        ModelError: messages, and the tokenizer has no chat template.
        RowRefusedError: the template refuses these messages.
    """
    if isinstance(prompt, str):
        bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = list(tokenizer(prompt)["input_ids"])
        # Some tokenizers also append EOS, after which there is nothing to say.
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] != bare[-1:] else ids
    if not is_chat(prompt):
        return [int(part) for part in prompt]  # type: ignore[call-overload]
    rendered = ChatRenderer(tokenizer).render(list(prompt), list(tools) if tools else None, generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def is_chat(prompt: Prompt) -> bool:
    """Say whether ``prompt`` is messages, so that the answer is a turn of its own and not the text going on."""
    # Ids may be numbers of numpy or torch too.
    return not isinstance(prompt, str) and not all(hasattr(part, "__index__") for part in prompt)


def refuse_one_prompt(prompts: Any) -> None:
    """Raise EvaluationError where ``prompts`` is one text or one conversation, whose parts would each be answered."""
    if isinstance(prompts, str):
        raise EvaluationError("prompts is a text; give a list of prompts, of one text too: [text].")
    if any(isinstance(prompt, Mapping) for prompt in prompts):
        raise EvaluationError("prompts is one conversation; give a list of conversations, of one too: [messages].")


def require_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, row: int = 1) -> list[int]:
    """Return the token ids of ``prompt`` (see :func:`encode_prompt`), the ``row``-th of those that must be answered.

    Raises:
        EvaluationError: it is empty, or the chat template refuses it.
    """
    try:
        ids = encode_prompt(tokenizer, prompt)
    except RowRefusedError as error:
        raise EvaluationError(f"prompt {row} cannot be answered: {error}") from error
    if not ids:
        raise EvaluationError(f"prompt {row} is empty: it has no token to go on from. Drop the row or give it a text.")
    return ids


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends an answer: the model's end tokens, the tokenizer's, the template's end of turn.

    The last one matters where a base model was given a chat template: its ``eos_token`` then is not the token that
    the template writes after an assistant's turn, and without it the model would go on with the user's next turn.
    """
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    ids |= {tokenizer.eos_token_id, _end_of_turn_id(tokenizer)}
    return sorted(token for token in ids if token is not None)


def set_ends(model: Any, tokenizer: Any) -> None:
    """Have ``model.generate``, and whatever loads the model once it is saved, end answers where the template does.

    ``tokenizer`` may be a processor; None changes nothing.
    """
    config = getattr(model, "generation_config", None)
    if tokenizer is None or config is None or not model.can_generate():
        return
    ends = stop_token_ids(model, getattr(tokenizer, "tokenizer", tokenizer))
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not set(ends) <= set(known):
        config.eos_token_id = ends if len(ends) > 1 else ends[0]


def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template writes after an assistant's words, None if it writes none."""
    if not tokenizer.chat_template:
        return None
    renderer, words = ChatRenderer(tokenizer), "words of the assistant"
    try:
        turn = renderer.locate_answer([{"role": "user", "content": "x"}, {"role": "assistant", "content": words}], 1)
    except RowRefusedError:  # a template that wants other messages than these; then the configured tokens must do
        return None
    found = renderer.special.search(turn.text[turn.start : turn.end].rpartition(words)[2])
    return tokenizer.convert_tokens_to_ids(found.group()) if found else None
