"""The demo task: answers are right by construction, and held-out rows share nothing with training rows."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from tunesmith.core.errors import DataError
from tunesmith.data.support_task import SCHEMA, SYSTEM_PROMPT, few_shot_prompt, generate
from tunesmith.data.support_task.words import HELDOUT, ISSUES, REQUESTS, TRAIN

SEEDS = (0, 1, 2, 3407)


def message(row: dict) -> str:
    return row["messages"][1]["content"]


def ticket(row: dict) -> dict:
    return json.loads(row["messages"][2]["content"])


def pattern_of(frame: str) -> re.Pattern[str]:
    """Return a pattern that finds the frame with any values in its slots."""
    parts = re.split(r"\{\w+\}", frame)
    return re.compile(".+".join(map(re.escape, parts)))


def test_there_are_at_least_thirty_frames_in_training_and_heldout_ones_are_others():
    assert len(set(TRAIN.frames)) >= 30
    assert len(set(HELDOUT.frames)) >= 15
    assert not set(TRAIN.frames) & set(HELDOUT.frames)


@pytest.mark.parametrize(
    "field", ["names", "brand_starts", "brand_ends", "variants", "things", "cities", "dates", "order_residue"]
)
def test_values_of_the_two_splits_are_disjoint(field):
    train, heldout = getattr(TRAIN, field), getattr(HELDOUT, field)
    assert len(set(train)) == len(train) and len(set(heldout)) == len(heldout)
    assert not set(train) & set(heldout)


@pytest.mark.parametrize("group", ["problems", "requests"])
def test_no_phrase_tells_two_categories_or_occurs_in_both_splits(group):
    phrases = [*itertools.chain(*getattr(TRAIN, group).values(), *getattr(HELDOUT, group).values())]
    assert len(set(phrases)) == len(phrases)


def test_every_label_has_phrases_in_both_splits():
    for words in (TRAIN, HELDOUT):
        assert tuple(words.problems) == ISSUES
        assert tuple(words.requests) == REQUESTS


@pytest.mark.parametrize("seed", SEEDS)
def test_no_heldout_value_occurs_in_any_training_text(seed):
    training_words = set(re.findall(r"\w+", " ".join(message(row) for row in generate("train", 600, seed))))
    for other_seed in SEEDS:
        for row in generate("heldout", 100, other_seed):
            answer = ticket(row)
            brand, *variant, thing = answer["product"].split()
            values = {answer["name"], brand, *variant, thing, *re.findall(r"\d{5}", message(row))}
            assert not values & training_words


@pytest.mark.parametrize("seed", SEEDS)
def test_no_heldout_frame_or_phrase_occurs_in_any_training_text(seed):
    training = [message(row) for row in generate("train", 600, seed)]
    phrases = [*itertools.chain(*HELDOUT.problems.values(), *HELDOUT.requests.values())]
    for pattern in [pattern_of(frame) for frame in HELDOUT.frames] + [pattern_of(phrase) for phrase in phrases]:
        assert not any(pattern.search(text) for text in training), pattern.pattern


@pytest.mark.parametrize(("split", "words"), [("train", TRAIN), ("heldout", HELDOUT)])
def test_the_answer_is_what_the_message_says(split, words):
    phrase_labels = {phrase: label for label, phrases in words.problems.items() for phrase in phrases}
    request_labels = {phrase: label for label, phrases in words.requests.items() for phrase in phrases}
    for row in generate(split, 400, 5):
        text, answer = message(row), ticket(row)
        assert answer["name"] in text and answer["product"] in text
        assert answer["order"] is None or answer["order"] in text
        # A phrase may contain a shorter one ("came in the wrong size"): the longest one found is the one written.
        assert phrase_labels[max((p for p in phrase_labels if p in text), key=len)] == answer["issue"]
        found = max((p for p in request_labels if p in text), key=len, default=None)
        assert (request_labels[found] if found else None) == answer["request"]
        assert "{" not in text


@pytest.mark.parametrize(("split", "words"), [("train", TRAIN), ("heldout", HELDOUT)])
def test_distractors_state_values_that_are_not_the_answer(split, words):
    rows = generate(split, 600, 9)
    numbers = [set(re.findall(r"\d{5}", message(row))) - {ticket(row)["order"]} for row in rows]
    brands = {start + end for start in words.brand_starts for end in words.brand_ends}
    others = [sum(word in brands for word in re.findall(r"\w+", message(row))) for row in rows]
    assert sum(map(bool, numbers)) > 30  # an order number that must not be copied
    assert sum(count > 1 for count in others) > 60  # a second product


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_are_messages_with_a_compact_answer_in_schema_order(split):
    for row in generate(split, 200, 1):
        assert [part["role"] for part in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == SYSTEM_PROMPT
        answer = ticket(row)
        assert list(answer) == SCHEMA["required"] == list(SCHEMA["properties"])
        assert row["messages"][2]["content"] == json.dumps(answer, separators=(",", ":"))
        assert answer["issue"] in SCHEMA["properties"]["issue"]["enum"]
        assert answer["request"] in SCHEMA["properties"]["request"]["enum"]


def test_optional_fields_are_sometimes_null_and_every_label_occurs():
    answers = [ticket(row) for row in generate("heldout", 300, 2)]
    assert {answer["issue"] for answer in answers} == set(ISSUES)
    assert {answer["request"] for answer in answers} == {*REQUESTS, None}
    assert 0.25 < sum(answer["order"] is None for answer in answers) / 300 < 0.45


def test_the_seed_decides_everything_and_rows_are_different():
    assert generate("train", 50, 1) == generate("train", 50, 1)
    assert generate("train", 50, 1) != generate("train", 50, 2)
    assert generate("train", 20, 1) == generate("train", 50, 1)[:20]
    assert len({message(row) for row in generate("train", 600, 1)}) == 600


def test_few_shot_prompt_has_the_schema_two_training_rows_and_not_the_answer():
    row = generate("heldout", 1, 0)[0]
    prompt = few_shot_prompt(row)
    assert [part["role"] for part in prompt] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert json.dumps(SCHEMA, separators=(",", ":")) in prompt[0]["content"]
    assert prompt[-1] == row["messages"][1]
    assert row["messages"][2]["content"] not in [part["content"] for part in prompt]
    examples = [json.loads(prompt[index]["content"]) for index in (2, 4)]
    assert [list(example.values()).count(None) for example in examples] == [0, 2]
    assert examples[0]["issue"] != examples[1]["issue"]
    assert {example["name"] for example in examples} <= set(TRAIN.names)


def test_unknown_split_and_negative_count_are_refused():
    with pytest.raises(DataError, match="split 'test' is unknown"):
        generate("test", 1, 0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="count is -1"):
        generate("train", -1, 0)
    assert generate("train", 0, 0) == []
