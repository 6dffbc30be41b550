"""How predictions of a task are scored, as plain functions of what was predicted and what is right.

Figures are shares between 0 and 1. Texts are compared without white space at both ends, and otherwise as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = ["are_span_tags", "macro_f1", "share", "span_f1", "tag_spans", "text_f1"]

# What stands before a span's kind in BIO, BIOES and BILOU tags: S and U its only word, B its first, E and L its last.
_ONLY = ("S", "U")
_FIRST = ("B", *_ONLY)
_LAST = ("E", "L", *_ONLY)
_MARKS = {"I", *_FIRST, *_LAST}


def share(hits: Sequence[bool]) -> float:
    """Return the share of True; 0 without any."""
    return sum(hits) / len(hits) if hits else 0.0


def macro_f1(right: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Return the mean F1 over the labels that occur in ``right``: a label that is never right counts 0."""
    pairs = list(zip(right, predicted, strict=True))
    hits = Counter(truth for truth, guess in pairs if truth == guess)
    total = Counter(right) + Counter(predicted)
    labels = set(right)
    return sum(2 * hits[label] / total[label] for label in labels) / len(labels) if labels else 0.0


def are_span_tags(labels: Sequence[str]) -> bool:
    """Return whether ``labels`` are BIO, BIOES or BILOU tags, of which :func:`tag_spans` reads every one."""
    marks = [mark if name else "" for mark, _, name in (label.partition("-") for label in labels if label != "O")]
    return _MARKS.issuperset(marks) and not set(marks).isdisjoint(_FIRST)


def tag_spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return the spans of a row of BIO, BIOES or BILOU tags as (first, behind the last, kind).

    A tag that should go on with a span and stands after another kind or after ``O`` begins one, as the conlleval
    script reads it.
    """
    spans: set[tuple[int, int, str]] = set()
    start, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = mark in _MARKS and mark not in _FIRST and name == kind
        if kind and not goes_on:
            spans.add((start, index, kind))
        if not goes_on:
            start, kind = index, name if mark in _MARKS else ""
        if kind and mark in _LAST:
            spans.add((start, index + 1, kind))
            kind = ""
    return spans


def span_f1(right: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """Return the F1 of whole spans over all rows: both ends and the kind have to be right."""
    truths = [tag_spans(tags) for tags in right]
    guesses = [tag_spans(tags) for tags in predicted]
    hits = sum(len(truth & guess) for truth, guess in zip(truths, guesses, strict=True))
    total = sum(map(len, truths)) + sum(map(len, guesses))
    return 2 * hits / total if total else 0.0


def text_f1(answer: str, reference: str) -> float:
    """Return the F1 of the words of an answer (Rajpurkar et al. 2016, arXiv:1606.05250); 1 where both are empty."""
    guess, truth = answer.split(), reference.split()
    if not guess or not truth:
        return float(guess == truth)
    hits = sum((Counter(guess) & Counter(truth)).values())
    return 2 * hits / (len(guess) + len(truth))
