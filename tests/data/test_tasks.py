"""Rows of tasks: columns, labels, pieces, places of answers, and what is left out or cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests import tiny, tiny_tasks

from tunesmith.core.errors import DataError
from tunesmith.data.task_rows import collect_labels, label_number, read_records, refuse_other_numbers
from tunesmith.data.tasks import IGNORED, TaskData, prepare_records, split_task_rows
from tunesmith.training.tasks.recipes import recipe_for


def prepare(rows: Any, task: str, *, mapping: Any = None, tokenizer: Any = None, **changes: Any) -> TaskData:
    own = {"labels": tiny_tasks.LABELS.get(task, ()), "max_length": 64, **changes}
    records = read_records(rows, task, mapping=mapping)
    return prepare_records(records, task, tokenizer or tiny_tasks.tokenizer(), **own)


def shown(ids: list[int]) -> list[str]:
    return tiny_tasks.tokenizer().convert_ids_to_tokens(ids)


# ---- columns ----


def test_columns_have_usual_names_or_a_mapping_names_them() -> None:
    usual = prepare([{"sentence": "ann", "labels": "warm", "id": 3}], "SEQ_CLS")
    mapped = prepare([{"a": "ann", "b": "warm", "text": "x"}], "SEQ_CLS", mapping={"a": "text", "b": "label"})
    assert usual.rows[0].features == mapped.rows[0].features
    assert usual.rows[0].features["labels"] == 1


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("SEQ_CLS", {"txet": "a", "label": "warm"}, r"row 1: SEQ_CLS rows need text, label, .*no text.*mean 'txet'"),
        ("SEQ_CLS", {"text": "a", "label": None}, "row 1: 'label' is null, and SEQ_CLS rows need it. Fill it in"),
        ("SEQ_CLS", {"text": "a"}, "row 1: SEQ_CLS rows need text, label, and this one has no label"),
        ("SEQ_CLS", {"text": " ", "label": "warm"}, "row 1: 'text' is empty; a text is needed"),
        ("SEQ_CLS", {"text": 3, "label": "warm"}, "row 1: 'text' is a number; a text is needed"),
        ("SEQ_CLS", {"text": "a", "label": [1]}, "row 1: 'label' is a list; a label is a text or a whole number"),
        ("SEQ_CLS", {"text": "a", "label": "hot"}, "row 1: label 'hot' is none of the model's labels .cold, warm."),
        ("SEQ_CLS", {"text": "a", "label": 2}, "row 1: label 2 is none of the model's labels"),
        ("TOKEN_CLS", {"tokens": ["a", "b"], "tags": ["O"]}, "row 1: 2 words and 1 tags. Each word needs one tag"),
        ("TOKEN_CLS", {"tokens": "a b", "tags": ["O", "O"]}, "row 1: 'tokens' is text; a list of words"),
        ("TOKEN_CLS", {"tokens": ["a", ""], "tags": ["O", "O"]}, "row 1: 'tokens', word 2 is empty"),
        ("TOKEN_CLS", {"tokens": ["a"], "tags": ["B-PRE"]}, "row 1: label 'B-PRE' .*Did you mean 'B-PER'"),
        ("TOKEN_CLS", {"tokens": ["a"], "tags": "O"}, "row 1: 'tags' is text; a list of tags is needed"),
        (
            "QUESTION_ANS",
            {"question": "a", "context": "ann", "answer": "bob"},
            "row 1: the answer 'bob' does not stand",
        ),
        ("QUESTION_ANS", {"question": "a", "context": "ann", "answer": "nn", "answer_start": 0}, "at character 0"),
        ("QUESTION_ANS", {"question": "a", "context": "ann", "answer": 3}, "row 1: 'answer' is a number; an answer is"),
        ("QUESTION_ANS", {"question": "a", "context": "ann", "answer": "ann", "answer_start": "0"}, "first character"),
        ("SEQ_CLS", {"text": "a \ud83d", "label": 1}, "row 1: 'text' holds half of a surrogate pair"),
        ("SEQ_2_SEQ_LM", {"source": "a"}, "row 1: SEQ_2_SEQ_LM rows need source, target"),
        (
            "FEATURE_EXTRACTION",
            {"sentence1": "a", "sentence2": "b", "score": 0.1},
            "row 1: the pair has a 'score', and FEATURE_EXTRACTION takes both texts of a row as alike",
        ),
        ("FEATURE_EXTRACTION", {"anchor": "a"}, "row 1: FEATURE_EXTRACTION rows need anchor, positive"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_what_is_wrong(task: str, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare([row], task)


@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_optional_cell_that_is_empty_is_none(tmp_path: Path, empty: Any) -> None:
    pair = {"text": "ann", "text_pair": empty, "label": "warm"}
    alone = {"text": "ann", "label": "warm"}
    assert prepare([pair], "SEQ_CLS").rows[0].features == prepare([alone], "SEQ_CLS").rows[0].features
    rows = [{"anchor": "ann", "positive": "bob", "negative": empty}]
    assert sorted(prepare(rows, "FEATURE_EXTRACTION").rows[0].features) == ["anchor", "positive"]
    judged = [{"a": "ann", "b": "bob", "label": 1}]
    assert prepare(judged, "FEATURE_EXTRACTION", mapping={"a": "anchor", "b": "positive"}).ledger.rows_kept == 1
    asked = {"question": "a", "context": "ann", "answer": "ann", "answer_start": empty}
    assert len(prepare([asked], "QUESTION_ANS")) == 1


def test_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "label": "warm"}, {"text": "b", "label": "hot"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: label 'hot'"):
        prepare(str(file), "SEQ_CLS")


def test_mappings_that_fit_no_row() -> None:
    with pytest.raises(DataError, match=r"makes 'a' the 'lable', which SEQ_CLS does not have.*Did you mean 'label'"):
        prepare([{"a": "x"}], "SEQ_CLS", mapping={"a": "lable"})
    with pytest.raises(DataError, match="two columns for 'text'"):
        prepare([{"a": "x", "b": "y"}], "SEQ_CLS", mapping={"a": "text", "b": "text"})


# ---- labels ----


def test_labels_are_collected_from_the_rows() -> None:
    assert collect_labels(read_records(tiny_tasks.colour_rows(50), "SEQ_CLS")) == ("cold", "warm")
    assert collect_labels(read_records(tiny_tasks.tag_rows(5), "TOKEN_CLS")) == tiny_tasks.LABELS["TOKEN_CLS"]
    numbers = [{"text": "a", "label": label} for label in (10, 9, 10, 2)]
    assert collect_labels(read_records(numbers, "SEQ_CLS")) == ("2", "9", "10")
    equal = [{"text": "a", "label": label} for label in ("01", "1", "-2")]
    assert collect_labels(read_records(equal, "SEQ_CLS")) == ("-2", "01", "1")
    dashes = [{"text": "a", "label": label} for label in ("--1", "1")]
    assert collect_labels(read_records(dashes, "SEQ_CLS")) == ("--1", "1")
    truths = [{"text": "a", "label": label} for label in (True, False)]
    assert collect_labels(read_records(truths, "SEQ_CLS")) == ("false", "true")
    with pytest.raises(DataError, match=r"the rows have 1 label \(x\)"):
        collect_labels(read_records([{"text": "a", "label": "x"}], "SEQ_CLS"))


def test_a_number_is_a_label_of_that_name_first() -> None:
    assert label_number(3, ("1", "2", "3"), "row") == 2
    assert label_number(1, ("no", "yes"), "row") == 1
    with pytest.raises(DataError, match="label 0 is none of the model's labels"):
        label_number(0, ("1", "2", "3"), "row")


# ---- tags ----


def test_the_first_piece_of_a_word_carries_its_tag() -> None:
    row = {"tokens": ["Ann", "unhappily", "has", "3", "figs", "."],
           "tags": ["B-PER", "O", "O", "B-THING", "I-THING", "O"]}  # fmt: skip
    made = prepare([row], "TOKEN_CLS").rows[0].features
    assert shown(made["input_ids"]) == [
        "[CLS]", "ann", "un", "##happi", "##ly", "has", "3", "figs", ".", "[SEP]"
    ]  # fmt: skip
    x = IGNORED
    assert made["labels"] == [x, 0, 3, x, x, 3, 1, 2, 3, x]


def test_pieces_of_a_byte_level_tokenizer_are_found_too() -> None:
    """Its pieces hold the space before a word."""
    row = {"tokens": ["zebra", "cat", "qqq", "the"], "tags": ["B-PER", "O", "B-THING", "I-THING"]}
    tokenizer = tiny.tiny_tokenizer()
    made = prepare([row], "TOKEN_CLS", tokenizer=tokenizer).rows[0].features
    labelled = [
        (tokenizer.decode([i]).strip(), n) for i, n in zip(made["input_ids"], made["labels"], strict=True) if n >= 0
    ]
    assert [number for _, number in labelled] == [0, 3, 1, 2]
    assert [text[:1] for text, _ in labelled] in (["z", "c", "q", "t"], ["z", "c", "", "t"])


def test_a_word_that_the_tokenizer_drops_is_counted() -> None:
    data = prepare([{"tokens": ["ann", "\u200d", "figs"], "tags": ["B-PER", "O", "I-THING"]}], "TOKEN_CLS")
    assert [n for n in data.rows[0].features["labels"] if n >= 0] == [0, 2]
    assert data.ledger.notes["word without a token of its own, so without its tag"] == 1
    last = prepare([{"tokens": ["ann", "figs", "\u200d"], "tags": ["B-PER", "O", "I-THING"]}], "TOKEN_CLS")
    assert last.ledger.notes == data.ledger.notes
    lost = prepare([{"tokens": ["\u200d"], "tags": ["O"]}], "TOKEN_CLS")
    assert lost.ledger.dropped == {"no word is a token": 1}


# ---- answers ----


@pytest.mark.parametrize(
    "answer", ["3 red figs", "3 red figs ", ["3 red figs", "figs"], {"text": ["3 red figs"], "answer_start": [21]}]
)
def test_the_tokens_of_an_answer_are_found(answer: Any) -> None:
    row = {"question": "what has ann ?", "context": "bob has 1 nut . Ann  3 red figs .", "answer": answer}
    row["context"] = "bob has 1 nuts . ann " + "3 red figs ."
    data = prepare([row], "QUESTION_ANS")
    made = data.rows[0]
    first, last = made.features["labels"]
    assert shown(made.features["input_ids"])[first : last + 1] == ["3", "red", "figs"]
    spans = made.reference["spans"]
    assert made.reference["context"][spans[first][0] : spans[last][1]] == "3 red figs"
    assert spans[0] is None and spans[2] is None  # [CLS] and the question
    assert made.features["token_type_ids"][first] == 1


def test_a_question_without_an_answer_points_to_the_first_token() -> None:
    rows = [{"question": "a", "context": "ann", "answers": {"text": [], "answer_start": []}}]
    made = prepare(rows, "QUESTION_ANS").rows[0]
    assert (made.features["labels"], made.reference["answers"]) == ([0, 0], [""])


def test_an_answer_that_stands_there_twice_is_said() -> None:
    data = prepare([{"question": "a", "context": "ann bob ann", "answer": "ann"}], "QUESTION_ANS")
    assert data.ledger.notes.total() == 1
    assert data.rows[0].reference["spans"][data.rows[0].features["labels"][0]] == (0, 3)


# ---- other tasks ----


def test_a_target_ends_where_generation_stops() -> None:
    made = prepare([{"source": "ann has", "target": "red figs"}], "SEQ_2_SEQ_LM", tokenizer=tiny.tiny_tokenizer())
    assert made.rows[0].features["labels"][-1] == tiny.tiny_tokenizer().eos_token_id
    twice = prepare([{"source": "ann has", "target": "red figs"}], "SEQ_2_SEQ_LM")
    assert twice.rows[0].features["labels"].count(tiny_tasks.tokenizer().eos_token_id) == 1


def test_a_target_that_ends_with_its_language_gets_no_second_end() -> None:
    """As mBART's tokenizer writes it; the decoder then starts with the language."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    tokenizer = tiny_tasks.language_tokenizer()
    data = prepare([{"source": "ann has", "target": "red figs"}], "SEQ_2_SEQ_LM", tokenizer=tokenizer)
    names = tokenizer.convert_ids_to_tokens(data.rows[0].features["labels"])
    assert names == ["red", "figs", "[SEP]", "[xx]"]
    cut = prepare([{"source": "ann has", "target": "red figs and nuts"}], "SEQ_2_SEQ_LM", tokenizer=tokenizer,
                  max_length=4, on_too_long="truncate")  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(cut.rows[0].features["labels"]) == names
    config = MBartConfig(vocab_size=len(tokenizer), d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
                         decoder_ffn_dim=8, encoder_attention_heads=1, decoder_attention_heads=1, pad_token_id=0,
                         decoder_start_token_id=tokenizer.convert_tokens_to_ids("[xx]"))  # fmt: skip
    batch = recipe_for(MBartForConditionalGeneration(config), tokenizer).collate(data.rows)
    assert tokenizer.convert_ids_to_tokens(batch["decoder_input_ids"][0]) == ["[xx]", "red", "figs", "[SEP]"]


def test_pairs_and_triples() -> None:
    rows = [{"query": "ann", "answer": "bob", "negative": "eve"}, {"query": "ann", "answer": "bob", "negative": None}]
    data = prepare(rows, "FEATURE_EXTRACTION")
    assert [sorted(row.features) for row in data.rows] == [["anchor", "negative", "positive"], ["anchor", "positive"]]
    assert data.rows[0].reference == "bob"


# ---- too long ----

LONG = {
    "SEQ_CLS": {"text": "ann has 3 red figs and the nuts", "label": "warm"},
    "TOKEN_CLS": {"tokens": ["ann", "has", "3", "figs", "and", "the"], "tags": ["B-PER", "O", "O", "O", "O", "O"]},
    "QUESTION_ANS": {"question": "what", "context": "ann has 3 red figs and the", "answer": "ann"},
    "SEQ_2_SEQ_LM": {"source": "ann", "target": "ann has 3 red figs and the nuts"},
    "FEATURE_EXTRACTION": {"anchor": "ann", "positive": "ann has 3 red figs and the nuts"},
}


@pytest.mark.parametrize("task", LONG)
def test_rows_that_are_too_long_are_dropped_or_cut_or_an_error_and_counted(task: str) -> None:
    rows = [LONG[task]]
    dropped = prepare(rows, task, max_length=7)
    assert (len(dropped), dropped.ledger.rows_in) == (0, 1)
    assert dropped.ledger.dropped == {"longer than 7 tokens": 1}
    with pytest.raises(DataError, match=r"1 row came in, none is left.\n  1 x longer than 7 tokens, first row 1: "):
        dropped.ledger.check()
    with pytest.raises(DataError, match=r"row 1: .* tokens, max_length is 7. Raise max_length"):
        prepare(rows, task, max_length=7, on_too_long="error")
    cut = prepare(rows, task, max_length=7, on_too_long="truncate")
    assert (len(cut), cut.ledger.rows_cut) == (1, 1)
    whole = prepare(rows, task)
    features, all_features = (data.rows[0].features for data in (cut, whole))
    lengths = [sum(len(ids) for ids in _id_lists(found)) for found in (features, all_features)]
    assert cut.ledger.tokens_cut == lengths[1] - lengths[0] > 0
    assert max(len(ids) for ids in _id_lists(features)) == 7
    if task == "SEQ_2_SEQ_LM":
        assert features["labels"][-1] == tiny_tasks.tokenizer().eos_token_id


def _id_lists(features: dict[str, Any]) -> list[list[int]]:
    if "anchor" in features:
        return [side["input_ids"] for side in features.values()]
    lists = [features["input_ids"]]
    # Tags have the length of their tokens, a target its own.
    if isinstance(features["labels"], list) and len(features["labels"]) not in (2, len(features["input_ids"])):
        lists.append(features["labels"])
    return lists


def test_a_row_whose_answer_is_cut_off_is_left_out() -> None:
    row = {"question": "what", "context": "ann has 3 red figs and the nuts", "answer": "nuts"}
    data = prepare([row], "QUESTION_ANS", max_length=7, on_too_long="truncate")
    assert data.ledger.dropped == {"answer cut off": 1}
    asked = prepare([{**row, "question": "what " * 9}], "QUESTION_ANS", max_length=7, on_too_long="truncate")
    assert asked.ledger.dropped == {"question longer than 7 tokens": 1}
    assert (data.ledger.rows_cut, data.ledger.tokens_cut) == (0, 0)


@pytest.mark.parametrize(("answer", "context"), [("\u200d", "ann \u200d has"), ("figs\u200d", "ann has figs\u200d")])
def test_an_answer_without_tokens_is_not_called_cut_off(answer: str, context: str) -> None:
    row = {"question": "what", "context": context, "answer": answer}
    assert prepare([row], "QUESTION_ANS").ledger.dropped == {"answer without a token of its own": 1}
    cut = prepare([{**row, "context": f"{context} and the nuts"}], "QUESTION_ANS", max_length=8, on_too_long="truncate")
    assert cut.ledger.dropped == {"answer without a token of its own": 1}


# ---- ledger and split ----


def test_the_ledger_counts_everything_and_fits_the_terminal() -> None:
    rows = [*tiny_tasks.colour_rows(30), {"text": "ann " * 80, "label": "warm"}]
    ledger = prepare(rows, "SEQ_CLS").ledger
    assert ledger.rows_in == 31 == ledger.rows_kept + sum(ledger.dropped.values())
    assert sum(ledger.labels.values()) == 30
    lines = ledger.lines(60)
    assert lines[0] == "rows        31 in, 30 kept, 1 dropped"
    assert any(line.startswith("labels      2: cold ") for line in lines)
    assert all(len(line) <= 60 for line in lines)
    assert json.loads(json.dumps(ledger.as_dict()))["labels"] == dict(ledger.labels)


def test_equal_rows_stay_on_one_side_of_a_split() -> None:
    data = prepare(tiny_tasks.colour_rows(400), "SEQ_CLS")
    train, held_out = split_task_rows(data, fraction=0.2, seed=0)
    assert held_out is not None
    assert len(train) + len(held_out) == 400
    assert not {row.fingerprint() for row in train.rows} & {row.fingerprint() for row in held_out.rows}
    assert train.ledger.splits == {"train": len(train), "eval": len(held_out)}
    assert split_task_rows(data, fraction=0, seed=0)[1] is None


def test_a_mapped_column_is_not_read_for_another_role_too() -> None:
    with pytest.raises(DataError, match="this one has no source"):
        prepare([{"text": "a b", "body": "c d"}], "SEQ_2_SEQ_LM", mapping={"text": "target"})


@pytest.mark.parametrize("start", [-1, True])
def test_an_answer_starts_at_a_character(start: Any) -> None:
    row = {"question": "a", "context": "ann", "answer": "n", "answer_start": start}
    with pytest.raises(DataError, match="the number of the answer's first character is needed"):
        prepare([row], "QUESTION_ANS")


def test_a_label_below_zero_is_none() -> None:
    """Public test sets have -1 where the label is held back."""
    with pytest.raises(DataError, match="row 1: label -1 is none of the model's labels"):
        prepare([{"text": "a", "label": -1}], "SEQ_CLS")


def test_a_mapped_column_that_a_row_lacks_is_not_replaced_by_a_usual_one() -> None:
    with pytest.raises(DataError, match="row 1: SEQ_CLS rows need text, label, and this one has no text"):
        prepare([{"sentence": "a", "label": "warm"}], "SEQ_CLS", mapping={"body": "text"})


def test_a_limit_is_the_number_of_rows_read() -> None:
    assert len(list(read_records(tiny_tasks.colour_rows(5), "SEQ_CLS", limit=3))) == 3


def test_classes_of_a_data_set_in_another_order_than_the_labels_of_the_model() -> None:
    classes = datasets.ClassLabel(names=["warm", "cold"])
    one = datasets.Dataset.from_list([{"label": 0}]).cast_column("label", classes)
    several = datasets.Dataset.from_list([{"tags": [0]}]).cast_column("tags", datasets.Sequence(classes))
    for source in (one, several, datasets.DatasetDict({"train": one})):
        refuse_other_numbers(source, ["warm", "cold"])
        refuse_other_numbers(source, ["LABEL_0", "LABEL_1"])
        with pytest.raises(DataError, match=r"label 0 would be trained as 'cold'.*id2label=\{0: 'warm', 1: 'cold'\}"):
            refuse_other_numbers(source, ["cold", "warm"])
    refuse_other_numbers([{"label": 0}], ["cold", "warm"])
