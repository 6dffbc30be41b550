"""How answers are scored, and how sure the figure is.

Normalisation is the same for every metric and deliberately small: white space at both ends of answer and reference
is ignored, nothing else. Case, punctuation, code fences and inner spaces count.

A row may have several references; an answer that satisfies any of them is right. Each metric turns a row into 0 or 1
and a set of rows into a :class:`Score` with a 95 % interval:

    exact_match, json_match, contains, regex    share of right rows, Wilson's interval
    label_f1                                    macro F1 over the labels of the references, seeded bootstrap
    perplexity                                  exp of the mean negative log-likelihood, seeded bootstrap over rows;
                                                it reads token likelihoods, not answers (see run.py)

:func:`compare` puts two scores of the same rows side by side. It is a paired comparison: the interval of the
difference is much narrower than the two intervals suggest, because both models met the same rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import EvaluationError
from tunesmith.core.names import did_you_mean
from tunesmith.evaluation.intervals import bootstrap, paired_proportions, wilson

__all__ = [
    "METRICS",
    "Difference",
    "Metric",
    "Score",
    "check_references",
    "compare",
    "get_metric",
    "perplexity_score",
    "score_answers",
]

Evidence = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """One figure over ``count`` rows.

    ``low`` and ``high`` bound the 95 % interval. ``per_row`` holds 0.0 or 1.0 a row (for perplexity: the row's mean
    negative log-likelihood). ``details`` holds companion figures, such as the accuracy beside macro F1. ``evidence``
    (N, columns) is what the statistic is computed from, kept so that two scores can be resampled together.
    """

    metric: str
    value: float
    low: float
    high: float
    count: int
    per_row: tuple[float, ...]
    evidence: Evidence = field(repr=False)
    details: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON, without the rows."""
        figures = {"metric": self.metric, "value": self.value, "interval": [self.low, self.high], "count": self.count}
        return {**figures, **self.details}


@dataclass(frozen=True, slots=True)
class Difference:
    """``tuned - base`` on the same rows with its 95 % interval; ``wins`` and ``losses`` count rows, ties neither."""

    metric: str
    value: float
    low: float
    high: float
    wins: int
    losses: int
    count: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        rows = {"wins": self.wins, "losses": self.losses, "count": self.count}
        return {"metric": self.metric, "value": self.value, "interval": [self.low, self.high], **rows}


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of :data:`METRICS`.

    ``is_right(answer, reference)`` judges one answer, both already stripped; None where no answer is generated.
    ``statistic(evidence, weights)`` maps evidence (N, columns) and row weights (B, N) to B values; None for a plain
    share of right rows, which has closed intervals.
    """

    name: str
    summary: str
    is_right: Callable[[str, str], bool] | None
    statistic: Callable[[Evidence, Evidence], Evidence] | None = None
    higher_is_better: bool = True

    @property
    def needs_answers(self) -> bool:
        """Whether the model has to generate; False for perplexity."""
        return self.is_right is not None


def get_metric(name: str) -> Metric:
    """Return the metric called ``name``.

    Raises:
        EvaluationError: there is none; the message lists all and names the nearest.
    """
    if name not in METRICS:
        hint = did_you_mean(name, METRICS)
        raise EvaluationError(f"metric {name!r} is unknown.{hint} Metrics are: {', '.join(METRICS)}.")
    return METRICS[name]


def score_answers(
    metric: str, answers: Sequence[str], references: Sequence[str | Sequence[str]], *, seed: int = 0
) -> Score:
    """Score ``answers[i]`` against ``references[i]``, one text or several of which any counts.

    ``seed`` drives the bootstrap of ``label_f1``; the other metrics have no randomness.

    Raises:
        EvaluationError: unknown metric, one that needs no answers, unequal lengths, no rows, or a reference that the
            metric cannot use (not JSON for ``json_match``, a faulty pattern for ``regex``).
    """
    chosen = get_metric(metric)
    if chosen.is_right is None:
        raise EvaluationError(
            f"metric {metric!r} scores token likelihoods, not answers. Use evaluate(..., {metric!r})."
        )
    if len(answers) != len(references):
        raise EvaluationError(f"{metric}: {len(answers)} answers for {len(references)} references. Give one a row.")
    _require_rows(metric, len(answers))
    stripped = [answer.strip() for answer in answers]
    wanted = check_references(metric, references)
    hits = _judge(chosen.is_right, stripped, wanted)
    if chosen.statistic is None:
        low, high = wilson(int(hits.sum()), len(hits))
        return Score(metric, float(hits.mean()), low, high, len(hits), tuple(hits.tolist()), hits[:, None])
    evidence = _label_evidence(stripped, wanted)
    value, low, high = bootstrap(chosen.statistic, evidence, seed=seed)
    details = {"accuracy": float(hits.mean())}
    return Score(metric, value, max(low, 0.0), min(high, 1.0), len(hits), tuple(hits.tolist()), evidence, details)


def check_references(metric: str, references: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """Return each row's references stripped; call it before generating, which takes longer than reading the error.

    Raises:
        EvaluationError: a row has none, or one that the metric cannot use.
    """
    return [_strip_references(metric, row, reference) for row, reference in enumerate(references, 1)]


def perplexity_score(losses: Sequence[float], tokens: Sequence[int], *, seed: int = 0) -> Score:
    """Return the perplexity of rows whose summed negative log-likelihoods are ``losses`` over ``tokens`` tokens each.

    The value is ``exp(sum(losses) / sum(tokens))``: every token counts the same, whatever row it stands in.
    """
    _require_rows("perplexity", len(losses))
    if len(losses) != len(tokens) or min(tokens) < 1:
        raise EvaluationError(
            f"perplexity: {len(losses)} losses for {len(tokens)} token counts, the smallest {min(tokens, default=0)}. "
            "Every row needs one loss and at least one trained token."
        )
    evidence = np.column_stack([np.asarray(losses, np.float64), np.asarray(tokens, np.float64)])
    faulty = np.flatnonzero(~np.isfinite(evidence[:, 0]))
    if len(faulty):
        raise EvaluationError(
            f"perplexity: the loss of row {faulty[0] + 1} is {losses[faulty[0]]}, so the model gives no likelihoods. "
            "Its weights are damaged, or its dtype overflows: try bfloat16 or float32."
        )
    value, low, high = bootstrap(_perplexity, evidence, seed=seed)
    per_row = tuple((evidence[:, 0] / evidence[:, 1]).tolist())
    low = max(low, 1.0)  # no model is less surprised than by what it is sure of
    details = {"loss": math.log(value), "tokens": float(evidence[:, 1].sum())}
    return Score("perplexity", value, low, high, len(per_row), per_row, evidence, details)


def compare(base: Score, tuned: Score, *, seed: int = 0) -> Difference:
    """Return ``tuned - base`` with a paired 95 % interval; row i of both must be the same row.

    Shares of right rows use the interval of Bonett and Price (2012) for paired proportions, an adjusted Wald interval
    that stays honest when the two models hardly ever disagree; the other metrics a seeded paired bootstrap.
    """
    if base.metric != tuned.metric or base.count != tuned.count:
        raise EvaluationError(
            f"cannot compare {base.metric} over {base.count} rows with {tuned.metric} over {tuned.count} rows. "
            "Score both models with one metric on the same rows."
        )
    metric = get_metric(base.metric)
    before, after = np.array(base.per_row), np.array(tuned.per_row)
    better, worse = (after > before, after < before) if metric.higher_is_better else (after < before, after > before)
    wins, losses = int(better.sum()), int(worse.sum())
    if metric.statistic is None:
        value, (low, high) = (wins - losses) / base.count, paired_proportions(wins, losses, base.count)
    else:
        value, low, high = _bootstrap_difference(metric.statistic, base.evidence, tuned.evidence, seed=seed)
        if metric.needs_answers:  # a difference of two shares
            low, high = max(low, -1.0), min(high, 1.0)
    return Difference(base.metric, value, low, high, wins, losses, base.count)


def _bootstrap_difference(
    statistic: Callable[[Evidence, Evidence], Evidence], base: Evidence, tuned: Evidence, *, seed: int
) -> tuple[float, float, float]:
    """Bootstrap ``statistic(tuned) - statistic(base)``, drawing the same rows for both."""
    columns = base.shape[1]

    def difference(both: Evidence, weights: Evidence) -> Evidence:
        return statistic(both[:, columns:], weights) - statistic(both[:, :columns], weights)

    return bootstrap(difference, np.hstack([base, tuned]), seed=seed)


def _require_rows(metric: str, count: int) -> None:
    if count == 0:
        raise EvaluationError(f"{metric}: there is no row to score. Give a data source with at least one row.")


def _strip_references(metric: str, row: int, reference: str | Sequence[str]) -> list[str]:
    """Return the stripped references of one row, refusing those the metric cannot use."""
    stripped = [text.strip() for text in ([reference] if isinstance(reference, str) else reference)]
    if not stripped:
        raise EvaluationError(f"{metric}: row {row} has no reference. Give at least one right answer a row.")
    for text in stripped:
        _check_reference(metric, row, text)
    return stripped


def _check_reference(metric: str, row: int, text: str) -> None:
    """Raise where ``text`` would make the metric meaningless: right for every answer, or for none."""
    if metric in {"contains", "regex"} and not text:
        raise EvaluationError(f"{metric}: row {row} has an empty reference, which every answer would satisfy.")
    if metric == "regex":
        try:
            re.compile(text)
        except re.error as error:
            raise EvaluationError(f"regex: the reference {text!r} of row {row} is no valid pattern: {error}.") from None
    if metric == "json_match":
        try:
            _parse_json(text)
        except ValueError as error:
            raise EvaluationError(
                f"json_match: the reference {text!r} of row {row} is no valid JSON: {error}. "
                "Use exact_match for plain text."
            ) from None


def _judge(
    is_right: Callable[[str, str], bool], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Evidence:
    """Return (N,) of 1.0 where the answer satisfies any of its references, else 0.0."""
    rights = [any(is_right(answer, text) for text in texts) for answer, texts in zip(answers, references, strict=True)]
    return np.array(rights, np.float64)


def _equal(answer: str, reference: str) -> bool:
    return answer == reference


def _contains(answer: str, reference: str) -> bool:
    return reference in answer


def _matches_pattern(answer: str, reference: str) -> bool:
    return re.search(reference, answer) is not None


def _equal_json(answer: str, reference: str) -> bool:
    try:
        return _same_value(_parse_json(answer), _parse_json(reference))
    except ValueError:
        return False


def _parse_json(text: str) -> Any:
    """Parse strict JSON: NaN, Infinity and repeated keys are errors, as is nesting too deep to read."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is repeated")
    return value


def _same_value(left: Any, right: Any) -> bool:
    """Return whether two parsed JSON values are equal. Unlike Python's ``==``, true is not 1 (but 1 is 1.0)."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same_value(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same_value, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _label_evidence(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Evidence:
    """Return (N, 2): the index of the true label and of the answered one, -1 for an answer that is no label.

    Of several references the one that was answered counts, else the first.
    """
    truths = [answer if answer in texts else texts[0] for answer, texts in zip(answers, references, strict=True)]
    index = {label: i for i, label in enumerate(sorted(set(truths)))}
    return np.array(
        [(index[truth], index.get(answer, -1)) for truth, answer in zip(truths, answers, strict=True)], float
    )


def _macro_f1(evidence: Evidence, weights: Evidence) -> Evidence:
    """Return the mean over labels of ``2 TP / (true + answered)``, (B,) for weights (B, N).

    Labels are those of the references. An answer that is no label lowers the recall of the true label and nothing
    else. A label that a resample neither asks for nor answers is left out of that resample's mean.
    """
    labels = np.arange(evidence[:, 0].max() + 1)
    true = evidence[:, :1] == labels
    answered = evidence[:, 1:] == labels
    hits = weights @ (true & answered)
    total = weights @ true + weights @ answered
    scores = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
    return scores.sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1)


def _perplexity(evidence: Evidence, weights: Evidence) -> Evidence:
    """Return ``exp(sum of losses / sum of tokens)``, (B,) for weights (B, N)."""
    return np.exp((weights @ evidence[:, 0]) / (weights @ evidence[:, 1]))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "the answer equals the reference", _equal),
        Metric("json_match", "both parse to the same JSON value; key order and spacing do not matter", _equal_json),
        Metric("contains", "the reference occurs in the answer", _contains),
        Metric(
            "regex", "the reference is a pattern that is found in the answer (anchor it with ^ and $)", _matches_pattern
        ),
        Metric("label_f1", "macro F1 over the labels of the references, and accuracy", _equal, _macro_f1),
        Metric("perplexity", "exp of the mean loss over the trained tokens", None, _perplexity, higher_is_better=False),
    )
}
"""Every metric by its name, in the order of the help text."""
