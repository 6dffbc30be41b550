"""What a trainer does with rows: masks by markers, the ledger of the whole source, and saying what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import tiny
from tests.training import support

from tunesmith import train_on_responses_only
from tunesmith.core.errors import DataError, SettingsError


def texts(count: int) -> list[dict[str, str]]:
    tokenizer = tiny.tiny_tokenizer()
    return [{"body": tokenizer.apply_chat_template(row["messages"], tokenize=False)} for row in tiny.chat_rows(count)]


@pytest.mark.parametrize("reads", ["derived", "given"])
def test_train_on_responses_only_agrees_with_the_conversations(reads: str, tmp_path: Path) -> None:
    conversations = support.trainer(tmp_path / "a", rows=20, eval_dataset=tiny.chat_rows(4, seed=8))
    from_text = support.trainer(
        tmp_path / "b",
        rows=texts(20),
        dataset_text_field="body",
        eval_dataset=[{"body": tiny.tiny_tokenizer().apply_chat_template(r["messages"], tokenize=False)}
                      for r in tiny.chat_rows(4, seed=8)],
    )  # fmt: skip
    assert from_text.train_data.documents[0].trained[1:].all(), "text trains on everything"
    parts = {} if reads == "derived" else {
        "instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"
    }  # fmt: skip
    returned = train_on_responses_only(from_text, **parts)
    assert returned is from_text
    for ours, theirs in (
        (from_text.train_data, conversations.train_data),
        (from_text.eval_data, conversations.eval_data),
    ):
        for mine, other in zip(ours.documents, theirs.documents, strict=True):
            length = len(other)
            assert mine.input_ids[:length].tolist() == other.input_ids.tolist()
            assert mine.trained[:length].tolist() == other.trained.tolist()
            assert not mine.trained[length:].any()
    # For rows that came as conversations nothing changes.
    before = conversations.train_data.fingerprint()
    assert train_on_responses_only(conversations).train_data.fingerprint() == before


def test_the_last_answers_of_conversations(tmp_path: Path) -> None:
    chat = tiny.chat_rows(2)
    rows = [{"messages": [*chat[0]["messages"], *chat[1]["messages"]]}]
    by_setting = support.trainer(tmp_path / "a", rows=rows, train_on="last")
    masked = train_on_responses_only(support.trainer(tmp_path / "b", rows=rows), last_response_only=True)
    assert masked.train_data.fingerprint() == by_setting.train_data.fingerprint()
    assert masked.ledger.answer_documents == 1 and not masked.ledger.untrained_ends


def test_rows_that_are_evaluated_later_are_masked_too(tmp_path: Path) -> None:
    rows = texts(4)
    trainer = support.trainer(tmp_path, rows=rows, eval_dataset=rows, dataset_text_field="body")
    train_on_responses_only(trainer)
    own, given = trainer.evaluate(), trainer.evaluate(rows)
    assert own["eval_tokens"] == given["eval_tokens"] and own["eval_loss"] == pytest.approx(given["eval_loss"])


def test_rows_without_an_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*texts(6), {"body": "no markers at all"}]
    trainer = train_on_responses_only(support.trainer(tmp_path, rows=rows, dataset_text_field="body"))
    assert len(trainer.train_data.documents) == 6
    assert sum(trainer.ledger.dropped.values()) == 1
    with pytest.raises(DataError):
        train_on_responses_only(support.trainer(tmp_path, rows=rows[-1:], dataset_text_field="body"))
    with pytest.raises(SettingsError):
        train_on_responses_only(support.trainer(tmp_path, rows=rows, dataset_text_field="body"), response_part="x")


def test_masking_keeps_what_the_ledger_knew_of_the_whole_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*texts(40), *({"body": None} for _ in range(3)), {"body": "no markers at all"}]
    trainer = support.trainer(tmp_path, rows=rows, dataset_text_field="body", eval_split=0.1)
    splits = trainer.ledger.splits
    assert trainer.ledger.dropped == {"null content": 3} and trainer.ledger.rows_kept == 41
    caplog.clear()
    ledger = train_on_responses_only(trainer).ledger
    assert "of 44 rows 4 are left out" in caplog.text
    assert ledger.rows_in == 44 == ledger.rows_kept + sum(ledger.dropped.values())
    assert ledger.dropped["null content"] == 3 and sum(ledger.dropped.values()) == 4
    assert ledger.splits["train"]["rows"] == len(trainer.train_data.rows)
    assert sum(side["rows"] for side in ledger.splits.values()) == 40
    assert ledger.splits["eval"]["tokens"] in (splits["eval"]["tokens"], splits["eval"]["tokens"] - 17)
    assert ledger.trained_tokens == sum(side["trained_tokens"] for side in ledger.splits.values())


def test_rows_that_are_left_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*tiny.chat_rows(8), {"messages": []}, {"messages": None}]
    trainer = support.trainer(tmp_path, rows=rows, max_length=40, on_too_long="truncate")
    said = [record.getMessage() for record in caplog.records if "rows" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("of 10 rows 2 are left out: 1 no messages (first row 9), 1 null")
    assert f"{trainer.ledger.rows_cut} are cut to max_length" in said[0]
    caplog.clear()
    support.trainer(tmp_path / "clean", rows=8)
    assert not [record for record in caplog.records if "left out" in record.getMessage()]
    trainer.evaluate([*tiny.chat_rows(2), {"messages": []}])
    assert "of 3 rows 1 are left out" in caplog.text
