"""Answers of a model to many prompts: batched, greedy by default, in the order of the prompts.

Prompts are sorted by length, so that a batch holds similar ones, and padded on the left under an attention mask; the
answers come back in the order given. Nothing of the model or the tokenizer is changed for good: training mode, padding
side and cache flags are afterwards what they were. The sampling defaults that some models carry in
``generation_config.json`` do not apply, since a score should not depend on them; its end tokens do.

In float32 a batched greedy answer equals the one generated alone. In bfloat16 a padded batch rounds differently, so
now and then a near tie between two tokens falls the other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import EvaluationError
from tunesmith.engine.host import compute_device
from tunesmith.engine.modes import evaluation_mode
from tunesmith.models.prompts import Prompt, refuse_one_prompt, require_prompt, stop_token_ids
from tunesmith.models.rope import native_window
from tunesmith.models.sampling import Sampling

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["generate_answers", "no_room"]


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] | None = None,
    seed: int = 3407,
    progress: Callable[[int, int], None] | None = None,
    streamer: Any = None,
) -> list[str]:
    """Return one answer a prompt, without special tokens and without the stop string that ended it.

    Args:
        model: any causal language model of transformers, PEFT models included.
        prompts: see :data:`tunesmith.models.prompts.Prompt`; messages go
            through the tokenizer's chat template with the assistant's turn opened.
        temperature: 0 takes the likeliest token each time; above 0 samples, with ``top_p``, ``top_k`` (0 = off) and
            ``min_p``. The same seed, prompts and batch size give the same answers; torch's generator is left as it was.
        stop: generation of a row ends where one of these strings appears in its answer.
        progress: called with (answers so far, all) after each batch.
        streamer: a streamer of transformers that is given the tokens as they come; for one prompt only.

    Raises:
        EvaluationError: a sampling setting outside its range, one prompt in the place of a list, an empty prompt or one
            that the chat template refuses, that has an unknown token or leaves no room for an answer, or a streamer for
            several prompts.
    """
    refuse_one_prompt(prompts)
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty)
    _check(sampling, max_new_tokens, batch_size, native_window(model.config))
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if "" in stops:
        raise EvaluationError("stop: an empty string would end every answer at once. Give strings with characters.")
    if streamer is not None and len(prompts) != 1:
        raise EvaluationError(
            f"a streamer follows one answer, and there are {len(prompts)} prompts. Give one at a time."
        )
    config = _generation_config(model, tokenizer, sampling, max_new_tokens)
    encoded = [require_prompt(tokenizer, prompt, row) for row, prompt in enumerate(prompts, 1)]
    known = model.get_input_embeddings().weight.shape[0]
    for row, ids in enumerate(encoded, 1):
        if not 0 <= min(ids) <= max(ids) < known:
            raise EvaluationError(f"prompt {row} has a token that is not there: the model knows 0 to {known - 1}.")
        fault = no_room(model, len(ids), max_new_tokens)
        if fault is not None:
            raise EvaluationError(f"prompt {row} {fault}. Shorten it, or ask for fewer new tokens.")
    # Longest first: if a batch does not fit into memory, it is the first one and not the last.
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    answers = [""] * len(encoded)
    with evaluation_mode(model), _seeded(model, seed):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = _answer_batch(model, tokenizer, [encoded[row] for row in rows], config, stops, streamer)
            for row, answer in zip(rows, batch, strict=True):
                answers[row] = answer
            if progress is not None:
                progress(start + len(rows), len(order))
    return answers


def no_room(model: PreTrainedModel, tokens: int, max_new_tokens: int) -> str | None:
    """Return what is wrong with a prompt of so many tokens where the model has too few positions, or None."""
    window = native_window(model.config)
    if window is None or tokens + max_new_tokens <= window:
        return None
    answer = f" and leaves no room for {max_new_tokens:,} of the answer" if max_new_tokens else ""
    return f"has {tokens:,} tokens{answer}: the model has {window:,} positions"


def _check(sampling: Sampling, max_new_tokens: int, batch_size: int, window: int | None) -> None:
    """Raise one error that names every setting outside its range."""
    window = window or math.inf
    checks = (
        (max_new_tokens < window, f"max_new_tokens={max_new_tokens} must be below the model's {window} positions"),
        (max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be 1 or more"),
        (batch_size >= 1, f"batch_size={batch_size} must be 1 or more"),
    )
    faults = [*(fault for is_fine, fault in checks if not is_fine), *sampling.faults()]
    if faults:
        raise EvaluationError(f"generation settings: {'; '.join(faults)}.")


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, max_new_tokens: int
) -> GenerationConfig:
    """Return settings with no sampling value left at None, which transformers would fill from the model's own file."""
    from transformers import GenerationConfig

    stops = stop_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    is_sampled = sampling.temperature > 0
    choice = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
    }
    neutral = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
    }  # transformers' defaults; others warn beside do_sample=False
    return GenerationConfig(
        do_sample=is_sampled,
        **(choice if is_sampled else neutral),
        repetition_penalty=sampling.repetition_penalty,
        num_beams=1,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=stops or None,
        # Padding is told by the mask, so any id will do for a tokenizer that has none.
        pad_token_id=pad if pad is not None else (stops or [0])[0],
    )


@contextmanager
def _seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seed torch for the block; its generators afterwards stand where they stood."""
    import torch

    device = compute_device(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[list[int]],
    config: GenerationConfig,
    stops: list[str],
    streamer: Any,
) -> list[str]:
    """Generate for one batch of encoded prompts and decode what is new."""
    input_ids, mask = _pad_left(batch, pad_id=config.pad_token_id, device=compute_device(model))
    width = input_ids.shape[1]
    criteria = [_stop_criterion(tokenizer, stops, width)] if stops else None
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=config,
        stopping_criteria=criteria,
        streamer=streamer,
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [_cut_at(text, stops) for text in texts]


def _pad_left(batch: list[list[int]], *, pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (B, T), the rows flush right."""
    import torch

    width = max(map(len, batch))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in batch], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
    return ids, mask


def _stop_criterion(tokenizer: PreTrainedTokenizerBase, stops: list[str], prompt_width: int) -> Any:
    """Return a criterion that ends a row once a stop string stands in what it has generated.

    transformers' own ``stop_strings`` also looks into the prompt, and would end an answer whose first character
    completes a stop string that the prompt began.
    """
    import torch
    from transformers import StoppingCriteria

    # A token holds at least one byte, so the newest stop string lies in this many tokens; 8 more keep it off the edge,
    # where some tokenizers drop a leading space.
    tail = max(len(text.encode()) for text in stops) + 8

    class EndsWithStop(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            texts = tokenizer.batch_decode(input_ids[:, prompt_width:][:, -tail:], skip_special_tokens=True)
            found = [any(text in answer for text in stops) for answer in texts]
            return torch.tensor(found, device=input_ids.device)

    return EndsWithStop()


def _cut_at(text: str, stops: list[str]) -> str:
    """Return ``text`` up to the first stop string in it."""
    ends = [position for position in map(text.find, stops) if position >= 0]
    return text[: min(ends)] if ends else text
