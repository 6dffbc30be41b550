"""Scores known by hand, intervals against published figures, and what must hold for any input."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import EvaluationError
from tunesmith.evaluation.intervals import paired_proportions, wilson
from tunesmith.evaluation.metrics import METRICS, compare, get_metric, perplexity_score, score_answers


def right(metric: str, answer: str, *references: str) -> bool:
    return score_answers(metric, [answer], [references]).per_row == (1.0,)


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "expected"),
    [
        ("exact_match", " yes\n", "yes", True),
        ("exact_match", "Yes", "yes", False),
        ("exact_match", "yes.", "yes", False),
        ("exact_match", "a  b", "a b", False),
        ("contains", "the answer is 42.", "42", True),
        ("contains", "the answer is 4 2", "42", False),
        ("contains", "YES", "yes", False),
        ("regex", "about 17 dogs", r"\d+ dogs?", True),
        ("regex", "about 17 dogs", r"^\d+", False),
        ("regex", "dogs", r"\d", False),
        ("json_match", '{"b": [1, 2],\n "a": null}', '{"a":null,"b":[1,2]}', True),
        ("json_match", '{"a":[2,1]}', '{"a":[1,2]}', False),
        ("json_match", '{"a":1}', '{"a":"1"}', False),
        ("json_match", '{"a":true}', '{"a":1}', False),
        ("json_match", '{"a":1.0}', '{"a":1}', True),
        ("json_match", '{"a":1,"b":2}', '{"a":1}', False),
        ("json_match", '{"a":2,"a":1}', '{"a":1}', False),
        ("json_match", '```json\n{"a":1}\n```', '{"a":1}', False),
        ("json_match", '{"a":1', '{"a":1}', False),
        ("json_match", "NaN", "1", False),
        ("json_match", "[" * 100_000, "[]", False),
        ("json_match", "", "null", False),
    ],
)
def test_one_answer_is_judged_as_documented(metric, answer, reference, expected):
    assert right(metric, answer, reference) is expected


@pytest.mark.parametrize("metric", ["exact_match", "contains", "regex", "json_match"])
def test_any_of_several_references_counts(metric):
    assert right(metric, '"b"', '"a"', '"b"')
    assert not right(metric, '"c"', '"a"', '"b"')


def test_a_score_is_the_share_of_right_rows_with_its_rows_in_order():
    score = score_answers("exact_match", ["a", "b", "c", "d"], ["a", "x", "c", "d"])
    assert score.value == 0.75
    assert score.per_row == (1.0, 0.0, 1.0, 1.0)
    assert score.count == 4
    assert score.low < 0.75 < score.high
    assert json.loads(json.dumps(score.as_dict()))["value"] == 0.75


def test_macro_f1_by_hand():
    # cat: 2 hits, 1 miss, 1 false alarm -> 2*2/(3+3) = 2/3; dog: 1 hit, 1 miss, 1 false alarm -> 2/(2+2) = 1/2.
    answers = ["cat", "cat", "dog", "cat", "dog"]
    truths = ["cat", "cat", "cat", "dog", "dog"]
    score = score_answers("label_f1", answers, truths)
    assert score.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert score.details["accuracy"] == pytest.approx(3 / 5)
    assert score.low <= score.value <= score.high


def test_an_answer_that_is_no_label_only_costs_recall():
    # cat: 1 hit of 2, answered once -> 2/(2+1) = 2/3; dog: 1 of 1 -> 1. "bird" is no label and makes no third class.
    assert score_answers("label_f1", ["cat", "bird", "dog"], ["cat", "cat", "dog"]).value == pytest.approx(5 / 6)


def test_a_label_with_several_right_answers_counts_as_the_one_given():
    assert score_answers("label_f1", ["b", "c"], [["a", "b"], ["c"]]).value == 1.0


def test_perplexity_weighs_tokens_not_rows():
    score = perplexity_score([2.0, 6.0], [1, 7])
    assert score.value == pytest.approx(math.exp(8 / 8))
    assert score.per_row == pytest.approx((2.0, 6 / 7))
    assert score.details == {"loss": pytest.approx(1.0), "tokens": 8.0}
    assert perplexity_score([0.0], [5]).value == 1.0


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3 (score).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_figures(hits, count, low, high):
    assert wilson(hits, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_paired_interval_by_hand():
    # 20 wins, 5 losses of 98: p = 21/100 and 6/100, difference 0.15, se = sqrt((0.27 - 0.0225) / 100) = 0.049749.
    low, high = paired_proportions(20, 5, 98)
    assert low == pytest.approx(0.15 - 1.959964 * 0.0497494, abs=1e-6)
    assert high == pytest.approx(0.15 + 1.959964 * 0.0497494, abs=1e-6)


def test_compare_is_paired():
    base = score_answers("exact_match", ["a"] * 40 + ["x"] * 60, ["a"] * 100)
    tuned = score_answers("exact_match", ["a"] * 90 + ["x"] * 10, ["a"] * 100)
    difference = compare(base, tuned)
    assert (difference.value, difference.wins, difference.losses, difference.count) == (0.5, 50, 0, 100)
    assert 0.35 < difference.low < 0.5 < difference.high < 0.65
    back = compare(tuned, base)
    assert (back.value, back.wins, back.losses) == (-0.5, 0, 50)
    assert back.low == pytest.approx(-difference.high)


def test_lower_perplexity_is_a_win():
    base = perplexity_score([4.0, 4.0, 1.0], [2, 2, 2])
    tuned = perplexity_score([2.0, 2.0, 2.0], [2, 2, 2])
    difference = compare(base, tuned)
    assert (difference.wins, difference.losses) == (2, 1)
    assert difference.value == pytest.approx(math.exp(1.0) - math.exp(1.5))
    assert difference.low <= difference.value <= difference.high


def test_bootstrap_is_seeded_and_close_to_the_known_width():
    answers = ["a" if row % 4 else "b" for row in range(400)]
    truths = ["a" if row % 2 else "b" for row in range(400)]
    first, second = (score_answers("label_f1", answers, truths, seed=1) for _ in range(2))
    assert (first.low, first.high) == (second.low, second.high)
    # Of accuracy 0.75 over 400 rows the standard error is 0.0217; macro F1 of two even classes varies about as much.
    assert 0.06 < first.high - first.low < 0.11


def test_the_bootstrap_of_many_rare_labels_is_laid_around_the_value():
    truths = [str(row // 3) for row in range(300)]
    answers = [truth if row % 3 else "0" for row, truth in enumerate(truths)]
    score = score_answers("label_f1", answers, truths)
    assert 0.02 < score.value - score.low < 0.1
    assert 0.02 < score.high - score.value < 0.1


def test_equal_models_have_no_difference_under_any_metric():
    for metric in ("exact_match", "label_f1"):
        score = score_answers(metric, ["a", "b", "b"], ["a", "b", "a"])
        difference = compare(score, score)
        assert difference.value == 0
        assert difference.low <= 0 <= difference.high


def test_metrics_lists_all_six():
    assert list(METRICS) == ["exact_match", "json_match", "contains", "regex", "label_f1", "perplexity"]
    assert not METRICS["perplexity"].needs_answers
    assert all(METRICS[name].needs_answers for name in METRICS if name != "perplexity")


@pytest.mark.parametrize(
    ("metric", "answers", "references", "message"),
    [
        ("exact_mach", ["a"], ["a"], "'exact_mach' is unknown. Did you mean 'exact_match'"),
        ("perplexity", ["a"], ["a"], "scores token likelihoods"),
        ("exact_match", [], [], "no row to score"),
        ("exact_match", ["a"], ["a", "b"], "1 answers for 2 references"),
        ("exact_match", ["a"], [[]], "row 1 has no reference"),
        ("contains", ["a"], [" "], "row 1 has an empty reference"),
        ("regex", ["a", "a"], ["a", "("], r"'\(' of row 2 is no valid pattern"),
        ("json_match", ["1"], ["hello"], "'hello' of row 1 is no valid JSON"),
    ],
)
def test_what_cannot_be_scored_is_refused(metric, answers, references, message):
    with pytest.raises(EvaluationError, match=message):
        score_answers(metric, answers, references)


def test_scores_of_different_rows_or_metrics_are_not_compared():
    one = score_answers("exact_match", ["a"], ["a"])
    two = score_answers("exact_match", ["a", "b"], ["a", "b"])
    other = score_answers("contains", ["a"], ["a"])
    for pair in ((one, two), (one, other)):
        with pytest.raises(EvaluationError, match="cannot compare"):
            compare(*pair)


def test_perplexity_refuses_rows_without_tokens():
    with pytest.raises(EvaluationError, match="at least one trained token"):
        perplexity_score([1.0, 0.0], [3, 0])
    with pytest.raises(EvaluationError, match="loss of row 2 is nan"):
        perplexity_score([1.0, math.nan], [3, 3])


@given(st.integers(1, 5000).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_holds_the_share_and_stays_inside(counts):
    hits, count = counts
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    mirrored = wilson(count - hits, count)
    assert low == pytest.approx(1 - mirrored[1], abs=1e-12)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 300))
def test_paired_interval_holds_the_difference(wins, losses, ties):
    count = wins + losses + ties
    low, high = paired_proportions(wins, losses, count)
    assert -1 <= low <= (wins - losses) / count <= high <= 1


labels = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abc")), min_size=1, max_size=30)


@given(labels)
@settings(max_examples=30, deadline=None)
def test_scores_lie_in_their_intervals_and_do_not_depend_on_row_order(pairs):
    for metric in ("exact_match", "label_f1"):
        score = score_answers(metric, [a for a, _ in pairs], [t for _, t in pairs])
        again = score_answers(metric, [a for a, _ in reversed(pairs)], [t for _, t in reversed(pairs)])
        assert 0 <= score.low <= score.value <= score.high <= 1
        assert score.value == pytest.approx(again.value)


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(1, 5)), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_perplexity_and_its_interval_are_one_or_more(rows):
    score = perplexity_score([loss for loss, _ in rows], [tokens for _, tokens in rows])
    assert 1 <= score.low <= score.value <= score.high


@given(st.lists(st.tuples(*[st.sampled_from("abc")] * 3), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_difference_of_two_f1_and_its_interval_are_at_most_one(rows):
    base, tuned, truths = zip(*rows, strict=True)
    found = compare(score_answers("label_f1", base, truths), score_answers("label_f1", tuned, truths))
    assert -1 <= found.low <= found.value <= found.high <= 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
@settings(deadline=None)
def test_json_match_ignores_layout_and_nothing_else(value):
    assert right("json_match", json.dumps(value, indent=3), json.dumps(value, ensure_ascii=False))
    assert not right("json_match", json.dumps([value]), json.dumps(value))


@given(st.text())
def test_exact_match_implies_contains(text):
    assert right("exact_match", f" {text}\n", text)
    if text.strip():
        assert right("contains", f"-{text.strip()}-", text)


def test_get_metric_returns_the_entry():
    assert get_metric("regex") is METRICS["regex"]
