"""The next token of every sequence of a step, chosen together, each by its own settings and its own generator.

A draw is one uniform number a sequence, looked up in its cumulated probabilities, likeliest token first. So the same
seed gives the same answer whatever else is answered beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.models.sampling import Sampling

__all__ = ["Choice", "Chooser", "choose"]

_CANDIDATES = 1024
"""Tokens that are sorted at first: nearly always they hold all that top_p, top_k and min_p leave."""


_GREEDY_BELOW = 1e-5
"""Temperatures that divide scores beyond what float32 holds mean the likeliest token."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token with the log-probabilities that the model itself gave, before any setting.

    Attributes:
        logprob: of the token; NaN where no log-probabilities were asked for.
        top: (token, log-probability) of the likeliest tokens, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Chooser:
    """How one sequence chooses.

    Attributes:
        presence_penalty: taken from the score of every token that was generated already.
        frequency_penalty: taken from it as often as it was generated.
        top_logprobs: likeliest tokens to report with each choice; None reports no log-probabilities.
        context: the tokens of prompt and answer, for the repetition penalty.
        counts: how often each token was generated.
    """

    sampling: Sampling
    generator: torch.Generator
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None
    context: set[int] | None = None
    counts: Counter[int] | None = None

    @classmethod
    def of(
        cls,
        sampling: Sampling,
        seed: int,
        prompt: Sequence[int],
        *,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        top_logprobs: int | None = None,
    ) -> Chooser:
        """Return the state of a sequence that begins with ``prompt``."""
        return cls(
            sampling,
            torch.Generator().manual_seed(seed),
            presence_penalty,
            frequency_penalty,
            top_logprobs,
            context=set(prompt) if sampling.repetition_penalty != 1 else None,
            counts=Counter() if presence_penalty or frequency_penalty else None,
        )

    def saw(self, token: int) -> None:
        """Note a token that was chosen."""
        if self.context is not None:
            self.context.add(token)
        if self.counts is not None:
            self.counts[token] += 1

    def penalize(self, scores: torch.Tensor) -> None:
        """Lower, in place, the scores (V,) of tokens that were there already."""
        if self.context:
            at = torch.tensor(sorted(self.context), device=scores.device)
            factor = self.sampling.repetition_penalty
            found = scores[at]
            scores[at] = torch.where(found < 0, found * factor, found / factor)
        if self.counts:
            at = torch.tensor(list(self.counts), device=scores.device)
            often = torch.tensor(list(self.counts.values()), device=scores.device, dtype=scores.dtype)
            scores[at] -= self.presence_penalty + self.frequency_penalty * often


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[Choice | None]:
    """Return the next token of each sequence for the logits (n, V); None where the highest is infinite or NaN."""
    logits = logits.float()
    scores = logits
    if any(chooser.context or chooser.counts for chooser in choosers):
        scores = logits.clone()
        for row, chooser in zip(scores, choosers, strict=True):
            chooser.penalize(row)
    is_finite = scores.amax(-1).isfinite()
    if not bool(is_finite.all()):
        scores = scores.masked_fill(~is_finite[:, None], 0)
    tokens = scores.argmax(-1)
    drawn = [row for row, chooser in enumerate(choosers) if chooser.sampling.temperature >= _GREEDY_BELOW]
    if drawn:
        tokens[drawn] = _draw(scores[drawn], [choosers[row] for row in drawn])
    return [
        _choice(token, row, chooser) if is_fine else None
        for token, row, chooser, is_fine in zip(tokens.tolist(), logits, choosers, is_finite.tolist(), strict=True)
    ]


def _choice(token: int, logits: torch.Tensor, chooser: Chooser) -> Choice:
    chooser.saw(token)
    if chooser.top_logprobs is None:
        return Choice(token, float("nan"))
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(chooser.top_logprobs)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Choice(token, logprobs[token].item(), tuple(pairs))


def _draw(scores: torch.Tensor, choosers: Sequence[Chooser]) -> torch.Tensor:
    """Return one token a row of ``scores`` (n, V), drawn as transformers' processors would leave them.

    In their order: temperature, top_k, top_p, min_p; the last two on what the first leave, renormalized.
    """

    def column(name: str) -> torch.Tensor:
        values = [getattr(chooser.sampling, name) for chooser in choosers]
        return torch.tensor(values, device=scores.device, dtype=torch.float32)[:, None]

    # Below the highest, so that a low temperature makes nothing infinite.
    scores = (scores - scores.amax(-1, keepdim=True)) / column("temperature")
    size = scores.shape[-1]
    top_k, top_p, min_p = column("top_k"), column("top_p"), column("min_p")
    top_k[top_k == 0] = size
    draws = torch.cat([torch.rand(1, generator=chooser.generator, dtype=torch.float64) for chooser in choosers])
    draws = draws.to(scores.device)[:, None]
    total = scores.logsumexp(-1, keepdim=True)
    for count in (min(_CANDIDATES, size), size):
        best = scores.topk(count)  # sorted, the likeliest first
        rank = torch.arange(count, device=scores.device)
        kept = torch.where(rank < top_k, (best.values - total).exp(), 0)
        # What top_k leaves is made to sum to 1; without it the candidates may be a part of all tokens.
        kept = kept / torch.where(top_k < size, kept.sum(-1, keepdim=True), 1.0)
        before = kept.cumsum(-1) - kept
        is_left = (before < top_p) & (kept >= min_p * kept[:, :1]) & (rank < top_k)
        cumulated = torch.where(is_left, kept, 0).double().cumsum(-1)
        # Of a top_k between the candidates and all tokens it is not known yet what it leaves.
        is_known = (top_k <= count) | (top_k >= size)
        # Where the last candidate is left out, so is all that comes after it; else the sum of all is 1 without limits.
        is_closed = is_known & ~is_left[:, -1:]
        mass = torch.where(is_closed, cumulated[:, -1:], 1.0)
        is_inside = is_closed | (is_known & (top_p == 1) & (min_p == 0) & (draws < cumulated[:, -1:]))
        if bool(is_inside.all()):
            break
    else:
        mass = cumulated[:, -1:]
    at = torch.searchsorted(cumulated, draws * mass, right=True)
    # Rounding may put a draw at the very end behind the last token.
    last = is_left.sum(-1, keepdim=True) - 1
    return best.indices.gather(1, torch.minimum(at, last))[:, 0]
