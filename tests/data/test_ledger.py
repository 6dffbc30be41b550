"""The ledger: its counts, its text, and the two things that stop a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tunesmith.core.errors import DataError
from tunesmith.data.ledger import CUT_NOTE, KeptRow, Ledger, count_trained, losses
from tunesmith.data.types import Document


def document(length=10, *, trained=4, end_trained=True, start=0, notes=(), ends=True):
    mask = np.zeros(length, dtype=bool)
    mask[length - trained :] = True
    mask[-1] = end_trained and trained > 0
    ids = np.arange(start, start + length, dtype=np.int32)
    return Document(ids, mask, "a.jsonl:1", end_of_turn=(length - 1,) if ends else (), notes=notes)


def row(*documents, **kwargs):
    return KeptRow(tuple(documents), kwargs.pop("where", "a.jsonl:1"), **kwargs)


def filled() -> Ledger:
    ledger = Ledger(rows_in=8)
    ledger.keep(row(document(10), document(20, trained=5), has_answers=True))
    ledger.keep(row(document(10), document(20, trained=5), has_answers=True))
    ledger.keep(row(document(40, start=7, notes=("split by turn", CUT_NOTE)), tokens_cut=12, answer_cut=True))
    for line in range(4):
        ledger.drop(f"a.jsonl:{line}", "null content", f"messages[{line}] is null.")
    ledger.drop("a.jsonl:9", "no assistant turn", "roles are\nuser.")
    ledger.drop_document("a.jsonl:1", "longer than 64 tokens", "90 tokens, max_length is 64.")
    ledger.splits = {"train": {"rows": 2, "documents": 4, "tokens": 60, "trained_tokens": 18}}
    ledger.bins, ledger.bin_capacity = 2, 64
    return ledger


def test_counts():
    ledger = filled()
    assert ledger.rows_in == ledger.rows_kept + sum(ledger.dropped.values()) == 8
    assert ledger.documents == 5
    assert ledger.tokens == 100
    assert ledger.trained_tokens == 4 + 5 + 4 + 5 + 4
    assert ledger.trained_share == 0.22
    assert ledger.duplicates == 1
    assert (ledger.rows_cut, ledger.tokens_cut, ledger.answers_cut) == (1, 12, 1)
    assert ledger.answer_documents == 4 and ledger.untrained_ends == 0
    assert ledger.packing_efficiency == 100 / 128
    assert len(ledger.examples["null content"]) == 3
    assert ledger.examples["null content"][0] == ("a.jsonl:0", "messages[0] is null.")


def test_the_first_token_is_never_trained():
    everything = Document(np.arange(3, dtype=np.int32), np.ones(3, dtype=bool), "x")
    alone = Document(np.arange(1, dtype=np.int32), np.ones(1, dtype=bool), "x")
    assert (count_trained(everything), count_trained(alone)) == (2, 0)


def test_fingerprints_follow_token_ids_and_document_borders():
    same = row(document(4), document(6))
    assert same.fingerprint() == row(document(4, trained=1), document(6), where="elsewhere").fingerprint()
    others = [row(document(6), document(4)), row(document(10)), row(document(4), document(6, start=1))]
    assert same.fingerprint() not in {other.fingerprint() for other in others}


def test_histogram_covers_every_document_once():
    ledger = Ledger()
    for length in (17, 32, 33, 100, 2048, 2049):
        ledger.keep(row(document(length)))
    bins = ledger.histogram()
    assert bins[:2] == [(17, 32, 2), (33, 64, 1)]
    assert bins[-1] == (2049, 4096, 1)
    assert sum(count for _, _, count in bins) == 6
    assert [low - 1 for low, _, _ in bins[1:]] == [high for _, high, _ in bins[:-1]]
    assert (ledger.length_at(0.5), ledger.length_at(1.0)) == (100, 2049)
    assert Ledger().histogram() == [] and Ledger().length_at(0.5) == 0


def test_as_dict_is_json_and_complete():
    counted = json.loads(json.dumps(filled().as_dict()))
    assert counted["rows_in"] == 8 and counted["rows_kept"] == 3
    assert counted["dropped"] == {"null content": 4, "no assistant turn": 1}
    assert counted["documents_dropped"] == {"longer than 64 tokens": 1}
    assert counted["examples"]["no assistant turn"] == [{"where": "a.jsonl:9", "detail": "roles are\nuser."}]
    assert counted["notes"] == {"split by turn": 1, CUT_NOTE: 1}
    assert counted["length_histogram"] == [[1, 16, 2], [17, 32, 2], [33, 64, 1]]
    assert (counted["length_median"], counted["length_95"], counted["length_longest"]) == (20, 40, 40)
    assert counted["splits"]["train"]["rows"] == 2
    json.dumps(Ledger().as_dict())


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_terminal_and_say_everything(width):
    lines = filled().lines(width)
    assert max(map(len, lines)) <= width
    if width < 80:
        return
    text = "\n".join(lines)
    for said in (
        "rows        8 in, 3 kept, 5 dropped",
        "dropped     4 null content  (a.jsonl:0: messages[0] is null.)",
        "dropped     1 no assistant turn  (a.jsonl:9: roles are user.)",
        "dropped     1 documents of kept rows longer than 64 tokens",
        "cut         1 rows, 12 tokens, in 1 of them the answer",
        "duplicates  1 rows equal an earlier one (kept)",
        "tokens      100, 22 trained (22.0 %)",
        "end of turn trained in 4 of 4 documents",
        "note        1 split by turn",
        "train       2 rows, 18 trained tokens",
        "packing     2 bins of 64 tokens, 78.1 % filled",
        "lengths     median 20, 95 % up to 40, longest 40",
        "                17-32 " + "█" * min(30, width // 3) + " 2",
    ):
        assert said.replace("  (", " (") in text


def test_lines_stay_few_with_many_reasons():
    ledger = Ledger(rows_in=100)
    for number in range(100):
        ledger.drop("a.jsonl:1", f"unknown role 'r{number}'", "x")
    lines = ledger.lines(80)
    assert len(lines) < 15
    assert "dropped     ... and 92 more reasons" in lines
    with pytest.raises(DataError, match="and 95 more reasons"):
        ledger.check()


def test_a_reason_that_does_not_fit_goes_on_in_the_next_line():
    ledger = Ledger(rows_in=1)
    detail = "there is no column 'qestion'; the row has the keys question, answer, source and " + "x" * 100
    ledger.drop("rows.jsonl:1", "mapped column missing", detail)
    lines = ledger.lines(80)
    assert max(map(len, lines)) <= 80 and all(line.startswith(" " * 12) for line in lines[2:4])
    assert detail.replace(" ", "") in "".join(lines).replace(" ", "")


def test_lines_hold_no_control_characters():
    ledger = Ledger(rows_in=1)
    ledger.drop("a.jsonl:1", "unknown role", "has\x1b[31m a role\r\n")
    assert all(line.isprintable() for line in ledger.lines(80))


def test_losses_tell_rows_from_documents_of_rows_that_are_kept():
    ledger = Ledger(rows_in=5)
    assert losses(ledger) is None
    ledger.drop("row 2", "null content", "messages is null")
    ledger.drop_document("row 4", "longer than 9 tokens", "12 tokens")
    ledger.drop_document("row 4", "longer than 9 tokens", "13 tokens")
    assert losses(ledger) == (
        "of 5 rows 1 are left out: 1 null content (first row 2); 2 documents of rows that are kept are left out: "
        "2 longer than 9 tokens (first row 4). The trainer's ledger has every reason."
    )


def test_check_passes_what_can_be_trained():
    filled().check()


def test_nothing_to_train_on_lists_the_reasons():
    ledger = Ledger(rows_in=3)
    ledger.drop("a.jsonl:1", "null content", "messages[0] is null.")
    ledger.drop("a.jsonl:2", "null content", "messages[1] is null.")
    ledger.drop("a.jsonl:3", "no assistant turn", "roles are user.")
    with pytest.raises(DataError) as caught:
        ledger.check()
    assert str(caught.value) == (
        "nothing to train on: 3 rows came in, none is left.\n"
        "  2 x null content, first a.jsonl:1: messages[0] is null.\n"
        "  1 x no assistant turn, first a.jsonl:3: roles are user."
    )


@pytest.mark.parametrize(("bad", "stops"), [(0, False), (1, False), (2, True)])
def test_untrained_ends_of_turn_stop_at_one_percent(bad, stops):
    ledger = Ledger(rows_in=200)
    good = 199 if bad == 1 else 198  # 1 of 200 is 0.5 %, 2 of 200 is 1 %
    for _ in range(good):
        ledger.keep(row(document(), has_answers=True))
    for _ in range(bad):
        ledger.keep(row(document(end_trained=False), has_answers=True, where="b.jsonl:3"))
    if not stops:
        ledger.check()
        return
    with pytest.raises(DataError, match="in 2 of 200 documents with answers the token that ends"):
        ledger.check()


def test_ends_of_turn_count_only_where_answers_train_and_were_not_cut():
    ledger = Ledger(rows_in=3)
    ledger.keep(row(document(ends=False), has_answers=False))
    ledger.keep(row(document(ends=False, notes=(CUT_NOTE,)), has_answers=True))
    assert ledger.answer_documents == 0
    ledger.check()
    ledger.keep(row(document(ends=False), has_answers=True))
    with pytest.raises(DataError, match=r"in 1 of 1 documents .* \(first: a.jsonl:1\)"):
        ledger.check()


def test_one_untrained_end_of_several_counts():
    trained = np.array([False, True, False, False, True, True])
    ledger = Ledger(rows_in=1)
    ledger.keep(row(Document(np.arange(6, dtype=np.int32), trained, "a.jsonl:1", end_of_turn=(2, 5)), has_answers=True))
    assert (ledger.answer_documents, ledger.untrained_ends) == (1, 1)
