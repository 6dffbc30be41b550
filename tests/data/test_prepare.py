"""From a source to counted documents: too long, nothing trained, limits, splits, and the datasets for a loader."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from tunesmith.core.errors import DataError, SettingsError
from tunesmith.data.collate import DocumentCollator
from tunesmith.data.ledger import CUT_NOTE
from tunesmith.data.prepare import (
    DocumentDataset,
    PackedDataset,
    prepare,
    split_documents,
    split_rows,
)
from tunesmith.data.types import Completion, Conversation, Document, RowRefusedError

END = 1


class CharEncoder:
    """One token a character and one (END) a turn; assistant characters and their END train. ``by_turn`` makes one
    document an answer, as the real encoder does for templates that are not prefix-stable."""

    def __init__(self, *, by_turn=False):
        self.by_turn = by_turn

    def encode(self, example):
        if isinstance(example, Conversation):
            return self._conversation(example)
        if isinstance(example, Completion):
            parts = [(example.prompt, False), (example.completion, True)]
        else:
            parts = [(example.text, True)]
        return [self._document(parts, example.where)]

    def _conversation(self, example):
        if any("refuse me" in (message["content"] or "") for message in example.messages):
            raise RowRefusedError("template error", "the template refuses these messages.")
        parts, documents = [], []
        for message, flag in zip(example.messages, example.train, strict=True):
            answers = message["role"] == "assistant"
            trains = answers if flag is None else flag
            parts.append(((message["content"] or json.dumps(message["tool_calls"])) + chr(END), trains))
            if self.by_turn and answers:
                earlier = [(text, False) for text, _ in parts[:-1]]
                documents.append(self._document([*earlier, parts[-1]], example.where, note="split by turn"))
        return documents or [self._document(parts, example.where)]

    def _document(self, parts, where, note=None):
        ids = np.array([ord(character) for text, _ in parts for character in text], dtype=np.int32)
        trained = np.array([trains for text, trains in parts for _ in text], dtype=bool)
        ends = tuple(int(position) for position in np.flatnonzero((ids == END) & trained))
        return Document(ids, trained, where, ends, (note,) if note else ())


def chat(question, answer, **flags):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **flags}]}


def run(rows, **kwargs):
    kwargs.setdefault("max_length", 50)
    data = prepare(rows, kwargs.pop("encoder", CharEncoder()), **kwargs)
    ledger = data.ledger
    assert ledger.rows_in == ledger.rows_kept + sum(ledger.dropped.values())
    assert ledger.rows_kept == len(data.rows)
    assert ledger.documents == len(data.documents)
    assert all(document.trained[1:].any() for document in data.documents)
    return data


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_kept_or_dropped_with_their_reason():
    rows = [
        chat("q", "answer"),
        {"x": 1},
        chat("q", ""),
        chat("q", "refuse me"),
        chat("q", "a", weight=0),
        chat("q", "b"),
    ]
    data = run(rows)
    assert [row.where for row in data.rows] == ["row 1", "row 6"]
    assert dict(data.ledger.dropped) == {
        "unknown schema": 1,
        "empty answer": 1,
        "template error": 1,
        "nothing to train on": 1,
    }
    assert data.ledger.examples["template error"] == [("row 4", "the template refuses these messages.")]
    assert data.ledger.trained_tokens == len("answer") + 1 + len("b") + 1
    data.ledger.check()


def test_mapping_and_limit():
    rows = [{"q": "a", "a": str(number)} for number in range(9)]
    data = run(rows, mapping={"q": "user", "a": "assistant"}, limit=4)
    assert data.ledger.rows_in == 4
    assert [row.where for row in data.rows] == ["row 1", "row 2", "row 3", "row 4"]


def test_source_split_and_errors_reach_the_caller(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "valid.jsonl").write_text('{"text": "defg"}\n{"text": ')
    assert run(tmp_path).ledger.tokens == 3
    with pytest.raises(DataError, match=r"valid.jsonl:2: not valid JSON"):
        run(tmp_path, split="valid")
    with pytest.raises(DataError, match="is mapped to 'usr'"):
        run(tmp_path, mapping={"text": "usr"})
    with pytest.raises(DataError, match="configuration of a hub dataset"):
        run(tmp_path, name="main")


def test_a_conversation_that_trains_nothing_at_all_stops_the_check():
    data = run([chat("q", "a", train=False)])
    with pytest.raises(
        DataError, match=r"nothing to train on: 1 row came in, none is left.\n  1 x nothing to train on"
    ):
        data.ledger.check()


def test_answers_are_expected_to_end_only_in_conversations():
    data = run([{"text": "abc"}, {"prompt": "a", "completion": "b"}, chat("q", "a"), chat("q", "b")])
    assert data.ledger.answer_documents == 2
    data.ledger.check()


# --- too long ---------------------------------------------------------------------------------------------------------


def test_too_long_is_dropped_and_counted_by_default():
    data = run([chat("q", "x" * 48), chat("q", "x" * 46)])
    assert [len(document) for document in data.documents] == [49]
    assert dict(data.ledger.dropped) == {"longer than 50 tokens": 1}
    assert data.ledger.examples["longer than 50 tokens"] == [("row 1", "51 tokens, max_length is 50.")]


def test_too_long_is_an_error_on_request():
    with pytest.raises(DataError) as caught:
        run([chat("q", "fits"), chat("q", "x" * 48)], on_too_long="error")
    assert str(caught.value) == (
        "row 2: 51 tokens, max_length is 50. Raise max_length, shorten the row, or choose on_too_long=drop (leave such "
        "rows out, counted) or truncate (cut them, counted)."
    )


def test_too_long_is_cut_and_counted_on_request():
    rows = [chat("q", "x" * 58), chat("y" * 60, "never reached"), chat("q", "fits"), {"text": "z" * 50}]
    data = run(rows, on_too_long="truncate")
    ledger = data.ledger
    assert [len(document) for document in data.documents] == [50, 7, 50]
    assert (ledger.rows_cut, ledger.tokens_cut, ledger.answers_cut) == (1, 11, 1)
    assert dict(ledger.dropped) == {"nothing trained after truncation": 1}
    assert ledger.notes == {CUT_NOTE: 1}
    cut = data.documents[0]
    assert cut.end_of_turn == () and cut.trained.sum() == 48
    ledger.check()  # the cut answer has lost its end of turn, as was asked for


def test_cutting_what_does_not_train_is_no_cut_answer():
    turns = [*chat("q", "a")["messages"], {"role": "user", "content": "y" * 60}]
    data = run([{"messages": turns}], on_too_long="truncate")
    assert (data.ledger.rows_cut, data.ledger.answers_cut) == (1, 0)


def test_one_turn_of_several_can_be_too_long():
    turns = chat("q", "short")["messages"] + chat("q2", "x" * 60)["messages"]
    data = run([{"messages": turns}], encoder=CharEncoder(by_turn=True))
    assert [len(document) for document in data.documents] == [8]
    assert data.ledger.rows_kept == 1
    assert dict(data.ledger.documents_dropped) == {"longer than 50 tokens": 1}
    assert not data.ledger.dropped
    assert data.ledger.notes == {"split by turn": 1}


def test_a_conversation_of_a_million_characters_is_counted_in_no_time():
    started = time.perf_counter()
    data = run([chat("q", "x" * 1_000_000), chat("q", "a")])
    assert time.perf_counter() - started < 5
    assert dict(data.ledger.dropped) == {"longer than 50 tokens": 1}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            {"on_too_long": "trunc"},
            "on_too_long='trunc' must be one of drop, error, truncate. Did you mean 'truncate'?",
        ),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"limit": 0}, "limit=0 must be at least 1 row"),
    ],
)
def test_settings_out_of_range(setting, expected):
    with pytest.raises(SettingsError) as caught:
        run([chat("q", "a")], **setting)
    assert expected in str(caught.value)


# --- splits -----------------------------------------------------------------------------------------------------------


def keys(*names):
    return [name.encode() for name in names]


def test_split_is_a_partition_and_follows_the_seed():
    fingerprints = keys(*map(str, range(200)))
    train, held_out = split_rows(fingerprints, fraction=0.05, seed=1)
    assert len(held_out) == 10
    assert sorted(train + held_out) == list(range(200))
    assert train == sorted(train) and held_out == sorted(held_out)
    assert split_rows(fingerprints, fraction=0.05, seed=1) == (train, held_out)
    assert split_rows(fingerprints, fraction=0.05, seed=2) != (train, held_out)


@pytest.mark.parametrize(
    ("rows", "fraction", "most", "expected"),
    [
        (19, 0.05, 500, 0),
        (20, 0.05, 500, 1),
        (20, 0.001, 500, 1),
        (40, 0.0, 500, 0),
        (300, 0.5, 7, 7),
        (60, 0.05, 500, 3),
        (20, 0.99, 500, 19),
    ],
)
def test_split_sizes(rows, fraction, most, expected):
    train, held_out = split_rows(keys(*map(str, range(rows))), fraction=fraction, most=most)
    assert (len(held_out), len(train)) == (expected, rows - expected)


@pytest.mark.parametrize("seed", range(10))
def test_equal_rows_stay_on_one_side(seed):
    fingerprints = keys(*(str(number % 31) for number in range(100)))
    train, held_out = split_rows(fingerprints, fraction=0.1, seed=seed)
    assert 0 < len(held_out) <= 10
    assert not {fingerprints[index] for index in train} & {fingerprints[index] for index in held_out}


def test_split_of_rows_that_are_all_doubled_or_all_equal():
    train, held_out = split_rows(keys(*"aaaaaaaaaabbbbbbbbbbb"), fraction=0.05)
    assert (len(held_out), len(train)) == (10, 11)
    assert split_rows(keys(*["a"] * 30)) == (list(range(30)), [])


@pytest.mark.parametrize(("fraction", "most"), [(1.0, 5), (-0.1, 5), (0.1, 0)])
def test_split_settings_out_of_range(fraction, most):
    with pytest.raises(SettingsError, match="must be"):
        split_rows(keys("a"), fraction=fraction, most=most)


def test_split_documents_gives_each_side_its_ledger():
    turns = chat("q", "one")["messages"]
    rows = [{"messages": [*turns, *chat("q", f"answer {number}")["messages"]]} for number in range(40)]
    data = run([*rows, {"x": 1}], encoder=CharEncoder(by_turn=True))
    train, held_out = split_documents(data, fraction=0.1, seed=5)
    assert held_out is not None
    assert (len(train.rows), len(held_out.rows)) == (36, 4)
    assert len(held_out.documents) == 8  # both documents of a row stay together
    assert {row.where for row in train.rows}.isdisjoint(row.where for row in held_out.rows)
    for side in (train, held_out):
        assert side.ledger.rows_in == side.ledger.rows_kept == len(side.rows)
        side.ledger.check()
    assert train.ledger.trained_tokens + held_out.ledger.trained_tokens == data.ledger.trained_tokens
    assert data.ledger.splits["eval"] == {
        "rows": 4,
        "documents": 8,
        "tokens": held_out.ledger.tokens,
        "trained_tokens": held_out.ledger.trained_tokens,
    }
    assert sum(data.ledger.dropped.values()) == 1


def test_no_eval_split_says_why():
    few = run([chat("q", str(number)) for number in range(5)])
    assert split_documents(few) == (few, None)
    assert few.ledger.notes == {"no eval split: fewer than 20 rows": 1}
    equal = run([chat("q", "a")] * 25)
    assert split_documents(equal)[1] is None
    assert equal.ledger.notes == {"no eval split: all rows are equal": 1}
    off = run([chat("q", str(number)) for number in range(25)])
    assert split_documents(off, fraction=0) == (off, None)
    assert not off.ledger.notes


def test_fingerprint_follows_tokens_and_what_trains():
    rows = [chat("q", "answer"), chat("q", "other")]
    fingerprint = run(rows).fingerprint()
    assert run(rows).fingerprint() == fingerprint
    second = [*rows[0]["messages"], *rows[1]["messages"]]
    trained_apart = [
        run([{"messages": [second[0], {**second[1], "train": flag}, *second[2:]]}]) for flag in (True, False)
    ]
    assert trained_apart[0].fingerprint() != trained_apart[1].fingerprint()
    assert run(rows[::-1]).fingerprint() != fingerprint
    assert run(rows[:1]).fingerprint() != fingerprint


# --- datasets ---------------------------------------------------------------------------------------------------------


def test_document_dataset_feeds_the_collator():
    data = run([chat("ab", "cd"), {"text": "xyz"}])
    dataset = DocumentDataset(data.documents)
    assert len(dataset) == 2 and dataset.lengths == [6, 3]
    assert dataset[0]["labels"].tolist() == [-100, -100, -100, ord("c"), ord("d"), END]
    batch = DocumentCollator()([dataset[0], dataset[1]])
    assert batch["rows"].tolist() == [2, 3, 4, 6, 7]
    assert batch["targets"].tolist() == [ord("c"), ord("d"), END, ord("y"), ord("z")]


def test_packed_dataset_holds_every_document_once():
    data = run([chat("q", "x" * (number % 40 + 1)) for number in range(60)])
    packed = PackedDataset(data.documents, 50, ledger=data.ledger)
    assert all(sum(packed[index]["lengths"]) == packed.lengths[index] <= 50 for index in range(len(packed)))
    assert sorted(length for index in range(len(packed)) for length in packed[index]["lengths"]) == sorted(
        data.ledger.lengths
    )
    collate = DocumentCollator()
    trained = sum(len(collate([packed[index]])["targets"]) for index in range(len(packed)))
    assert trained == data.ledger.trained_tokens
    assert data.ledger.bins == len(packed) < len(data.documents)
    assert data.ledger.packing_efficiency == data.ledger.tokens / (50 * len(packed))
