"""Sources of rows: what is read, where it says it came from, and what each broken file is answered."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tunesmith.core.errors import DataError
from tunesmith.data.files import formatted_rows, has_valid, list_splits, read_rows

ROWS = [{"text": "one"}, {"text": 'zwei, "zwo"\nund drei'}, {"text": "é 日本 \u2028 🙂"}]


def values(source, **kwargs):
    return [row.value for row in read_rows(source, **kwargs)]


def error_of(source, **kwargs):
    with pytest.raises(DataError) as caught:
        list(read_rows(source, **kwargs))
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(path: Path, rows=ROWS) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_arrow(path, rows)
    return path


def write_arrow(path: Path, rows) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as sink:
            sink.write_table(table)
    return path


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".JSONL"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = write_rows(tmp_path / f"rows{suffix.lower()}").rename(tmp_path / f"rows{suffix}")
    assert values(path) == ROWS
    assert values(str(path)) == ROWS


def test_arrow_files_are_read_as_well_as_streams(tmp_path):
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as sink:
        sink.write_table(table)
    assert values(tmp_path / "rows.arrow") == ROWS


def test_objects_give_the_same_rows():
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    assert values(ROWS) == values(iter(ROWS)) == values(dataset) == ROWS
    assert values(dataset.to_iterable_dataset()) == ROWS
    assert values(dataset.with_format("numpy")) == ROWS


def test_the_transform_of_a_dataset_makes_its_rows():
    import datasets

    dataset = datasets.Dataset.from_list([{"question": "a", "note": None}, {"question": "b", "note": None}])
    dataset.set_transform(lambda rows: {"text": [f"{question}?" for question in rows["question"]]})
    assert values(dataset) == [{"text": "a?"}, {"text": "b?"}]


def test_rows_as_pandas_holds_them():
    import pandas as pd

    row = {"label": 1, "tags": [1, 2], "answers": {"text": ["a"], "answer_start": [0]}, "messages": [{"role": "user"}]}
    held = {"label": np.int64(1), "tags": np.array([1, 2]), "messages": np.array(row["messages"], dtype=object),
            "answers": {"text": np.array(["a"], dtype=object), "answer_start": np.array([0])}}  # fmt: skip
    (value,) = values([held])
    assert value == row
    assert type(value["label"]) is int and type(value["answers"]["answer_start"][0]) is int
    assert "a DataFrame is no list of rows. Give datasets.Dataset.from_pandas(frame)" in error_of(pd.DataFrame([row]))


def test_places_name_file_and_line(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", '\n{"text": "x"}\n\n  \n{"text": "y"}')
    table = write(tmp_path / "a.csv", 'text,n\n"two\nlines",1\n\nz,2\n')
    text = write(tmp_path / "a.txt", "\n\none\nmore\n \n\ntwo\n")
    whole = write_rows(tmp_path / "a.json")
    assert [row.where for row in read_rows(jsonl)] == ["a.jsonl:2", "a.jsonl:5"]
    assert [row.where for row in read_rows(table)] == ["a.csv:2", "a.csv:5"]
    assert [row.where for row in read_rows(text)] == ["a.txt:3", "a.txt:7"]
    assert [row.where for row in read_rows(whole)][1] == "a.json row 2"
    assert [row.where for row in read_rows(ROWS)][2] == "row 3"


def test_text_paragraphs_are_rows(tmp_path):
    path = write(tmp_path / "story.txt", "first\r\n  still first\r\n\r\n\r\nsecond\n")
    assert values(path) == [{"text": "first\n  still first"}, {"text": "second"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_byte_order_mark_and_crlf_are_no_content(tmp_path, suffix):
    plain = {".jsonl": '{"text": "a"}\n{"text": "b"}\n', ".json": '[{"text": "a"},\n{"text": "b"}]\n'}
    plain |= {".csv": "text\na\nb\n", ".txt": "a\n\nb\n"}
    path = write(tmp_path / f"rows{suffix}", b"\xef\xbb\xbf" + plain[suffix].replace("\n", "\r\n").encode())
    assert values(path) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("key", ["data", "rows", "train"])
def test_json_object_with_one_list_of_rows(tmp_path, key):
    path = write(tmp_path / "rows.json", json.dumps({"version": 1, key: ROWS}))
    assert values(path) == ROWS


def test_json_lines_under_the_json_suffix_are_understood(tmp_path):
    path = write(tmp_path / "rows.json", '{"text": "a"}\n{"text": "b"}\n')
    assert [(row.value, row.where) for row in read_rows(path)][1] == ({"text": "b"}, "rows.json:2")


def test_missing_json_keys_stay_missing_and_arrow_nulls_go(tmp_path):
    rows = [{"m": [{"a": "x", "b": {"c": "y"}}], "n": None}, {"m": [{"a": "z", "d": "w"}], "n": "k"}]
    assert values(write_rows(tmp_path / "rows.jsonl", rows)) == rows
    assert values(write_rows(tmp_path / "rows.parquet", rows)) == rows


def test_a_million_characters_in_one_cell(tmp_path):
    rows = [{"text": "a,b\n" * 250_000}]
    limit = csv.field_size_limit()
    for suffix in (".jsonl", ".csv"):
        assert values(write_rows(tmp_path / f"rows{suffix}", rows)) == rows
    assert csv.field_size_limit() == limit


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", ["valid", "validation", "val", "eval", "dev"])
def test_folder_splits(tmp_path, valid):
    write_rows(tmp_path / "train.jsonl")
    write_rows(tmp_path / f"{valid}.csv", [{"text": "v"}])
    write_rows(tmp_path / "notes.jsonl")
    assert list_splits(tmp_path) == ("train", "valid")
    assert values(tmp_path) == ROWS
    assert values(tmp_path, split="valid") == values(tmp_path, split=valid) == [{"text": "v"}]
    assert error_of(tmp_path, split="test").endswith("has no file for the split 'test'; it has train, valid.")


def test_dataset_dict_splits():
    import datasets

    both = datasets.DatasetDict(
        train_sft=datasets.Dataset.from_list(ROWS), validation=datasets.Dataset.from_list([{"text": "v"}])
    )
    assert list_splits(both) == ("valid", "train_sft")
    assert values(both, split="train_sft") == ROWS
    assert values(both, split="valid") == [{"text": "v"}]
    message = error_of(both, split="train_stf")
    assert "it has 'train_sft', 'validation'. Did you mean 'train_sft'?" in message


def test_one_file_or_list_has_only_train(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    assert list_splits(path) == list_splits(ROWS) == ("train",)
    assert "has only the split 'train', not 'test'" in error_of(path, split="test")
    assert "has only the split 'train', not 'valid'" in error_of(ROWS, split="valid")


def test_folder_with_two_files_for_a_split_or_none(tmp_path):
    assert "there is no data file at all" in error_of(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    assert "there is rows.jsonl. Rename one to train.jsonl" in error_of(tmp_path)
    write_rows(tmp_path / "train.jsonl")
    write_rows(tmp_path / "train.csv")
    assert "holds train.csv and train.jsonl, both for the split 'train'" in error_of(tmp_path)


# --- broken sources ---------------------------------------------------------------------------------------------------


def test_missing_file_names_the_nearest(tmp_path):
    write_rows(tmp_path / "train.jsonl")
    message = error_of(tmp_path / "trian.jsonl")
    assert "no data at" in message and "Did you mean 'train.jsonl'? Data files there: train.jsonl." in message
    assert "does not exist" in error_of(tmp_path / "nowhere" / "x.jsonl")


@pytest.mark.parametrize("name", ["~backup.jsonl", "~nobody-of-this-name/rows.jsonl", "x" * 300 + ".jsonl"])
def test_names_that_are_no_paths_of_this_system(name):
    assert "no data at" in error_of(name)


def test_a_folder_at_home_has_its_valid_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "chat").mkdir()
    write_rows(tmp_path / "chat" / "train.jsonl")
    assert not has_valid("~/chat") and not has_valid(ROWS) and not has_valid("some/hub-id")
    write_rows(tmp_path / "chat" / "valid.jsonl")
    assert has_valid("~/chat") and has_valid(tmp_path / "chat") and not has_valid("~/chat/train.jsonl")


def test_what_a_formatting_function_may_return():
    assert [row["text"] for row in formatted_rows(ROWS[:1], lambda row: [row["text"], "two"])] == ["one", "two"]
    for made, kind in (({"texts": "x"}, "returned an object"), (None, "returned null"), ([None], "returned a list")):
        with pytest.raises(DataError, match=f"row 1: formatting_func.* {kind}"):
            list(formatted_rows(ROWS[:1], lambda row, made=made: made))


@pytest.mark.parametrize(
    ("function", "row", "expected"),
    [
        # An answer of one letter makes one text of the letters of a row, too.
        (
            lambda rows: [f"{question} {answer}" for question, answer in zip(rows["q"], rows["a"], strict=False)],
            {"q": "What is it?", "a": "B"},
            ["What is it? B"],
        ),
        (lambda rows: [f"{number}+" for number in rows["n"]], {"n": 7}, ["7+"]),
        # Lists of texts in a row look like columns of many.
        (lambda row: [f"Q: {question}" for question in row["q"]], {"q": ["one", "two"]}, ["Q: one", "Q: two"]),
        (lambda row: row["q"][:9], {"q": "What is it, and why?"}, ["What is i"]),
        (lambda row: row["q"][-9:], {"q": "What is it, and why?"}, ["and why?"]),
        (lambda row: f"{row['q']} {row['n']}", {"q": "x", "n": 7}, ["x 7"]),
    ],
)
def test_a_formatting_function_gets_rows_or_columns(function, row, expected):
    assert [made["text"].strip() for made in formatted_rows([row], function)] == expected


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_column_that_stands_twice(tmp_path, suffix):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table([pa.array(["first"]), pa.array(["second"])], names=["text", "text"])
    if suffix == ".parquet":
        parquet.write_table(table, tmp_path / "rows.parquet")
    else:
        with pa.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as sink:
            sink.write_table(table)
    assert f"rows{suffix}: the column 'text' stands there twice" in error_of(tmp_path / f"rows{suffix}")


def test_a_date_that_no_calendar_has(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    days = pa.array([2**31 - 1], pa.int32()).cast(pa.date32())
    parquet.write_table(pa.table({"text": ["a"], "day": days}), tmp_path / "rows.parquet")
    assert "after row 0: damaged" in error_of(tmp_path / "rows.parquet")


def test_unknown_suffix(tmp_path):
    message = error_of(write(tmp_path / "rows.jsnl", "{}"))
    assert "files of type '.jsnl' are not read. Accepted are .jsonl, .json, .csv" in message
    assert "Did you mean '.jsonl'?" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt"])
def test_empty_file(tmp_path, suffix):
    assert "is empty (0 bytes)" in error_of(write(tmp_path / f"rows{suffix}", b""))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "text\n"), ("a.txt", "\n\n"), ("a.json", '{"data": []}')],
)
def test_file_without_rows(tmp_path, name, content):
    assert "holds no rows" in error_of(write(tmp_path / name, content))


def test_list_without_rows_and_rows_that_are_no_dicts():
    assert error_of([]) == "the list of rows holds no rows. At least one is needed."
    assert "row 2: a row must be a dict, this is text." in error_of([{"text": "x"}, "y"])
    assert "rows must be a list of dicts, not an object" in error_of({"train": ROWS})
    assert "rows must be a list of dicts, not a number" in error_of(3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\n{"text": "b', "rows.jsonl:2: not valid JSON: Unterminated string starting at column 10."),
        ('{"text": "a"}\n{"text": "b', "The row ends in the middle: was the file written, copied"),
        (' {"text" 1}', "rows.jsonl:1: not valid JSON: Expecting ':' delimiter at column 10."),
        ('{"text": "a"}\n{"text" "b"}\n', "rows.jsonl:2: not valid JSON: Expecting ':' delimiter at column 9."),
        ('{"text": NaN}\n', "rows.jsonl:1: not valid JSON: NaN is no JSON value."),
        ('{"text": "a", "text": "b"}\n', "rows.jsonl:1: the key 'text' stands twice in one object."),
        ('"text"\n', "rows.jsonl:1: a row must be a JSON object like {...}, this is text."),
        ('[{"text": "a"}]\n', "this is a list. A file that is one JSON list must be named .json."),
        ('{"text": ' + "[" * 100_000, "rows.jsonl:1: the JSON is nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}\n", "rows.jsonl:1: not valid JSON: Exceeds the limit"),
    ],
)
def test_broken_json_lines(tmp_path, content, expected):
    assert expected in error_of(write(tmp_path / "rows.jsonl", content))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "a"},\n {"text": ', "rows.json:2: not valid JSON: Expecting value at column 11. The row ends"),
        ('[{"text": "a"},\n {"text" 1}, {}]', "rows.json:2: not valid JSON: Expecting ':' delimiter at column 10."),
        ('{"a": [], "b": 1}', "This object has the keys 'a', 'b'."),
        ('{"data": [], "rows": []}', "with one list under 'data', 'rows' or 'train'"),
        ("3", "must hold a list of rows, not a number"),
        ('[{"text": "a"}, 7]', "rows.json row 2: a row must be a JSON object like {...}, this is a number."),
        ('[{"text": Infinity}]', "Infinity is no JSON value"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_json(tmp_path, content, expected):
    assert expected in error_of(write(tmp_path / "rows.json", content))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_not_utf8_names_line_and_byte(tmp_path, suffix):
    good, bad = b'{"text": "ok"}\n', b'{"text": "caf\xe9"}\n'
    message = error_of(write(tmp_path / f"rows{suffix}", good + bad))
    assert f"rows{suffix}:2: not valid UTF-8: byte 0xe9 at offset 28 of the file." in message
    assert "iconv -f" in message


def test_utf8_offset_counts_the_byte_order_mark_and_utf16_is_named(tmp_path):
    assert "offset 13 " in error_of(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "\xe9"}'))
    assert "It begins like UTF-16" in error_of(write(tmp_path / "b.csv", "text\na\n".encode("utf-16")))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1,2\n1\n", "rows.csv:3: 1 cells, but the header names 2 columns"),
        ("a,b\n1,2,3\n", "rows.csv:2: 3 cells, but the header names 2 columns"),
        ('a,b\n1,2\n"1,2\n', "rows.csv:3: not valid CSV: unexpected end of data"),
        ("a,\n1,2\n", "rows.csv:1: column 2 of the header has no name"),
        ("a,a\n1,2\n", "rows.csv:1: the header names the column 'a' twice"),
        ("q;a\n1;2\n", "rows.csv:1: the columns are separated by semicolons"),
        ("q\ta\n1\t2\n", "rows.csv:1: the columns are separated by tabs"),
        ("\n\n", "rows.csv holds no header line"),
    ],
)
def test_broken_csv(tmp_path, content, expected):
    assert expected in error_of(write(tmp_path / "rows.csv", content))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_damaged_arrow_files(tmp_path, suffix):
    path = write_rows(tmp_path / f"rows{suffix}")
    whole = path.read_bytes()
    for content in (b"no such file at all", whole[: len(whole) // 2], whole[: len(whole) // 4]):
        assert f"damaged, or no {suffix} file" in error_of(write(path, content))


def test_unreadable_file(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop the root user that tests may run as
    assert error_of(path).endswith("rows.jsonl cannot be read: Permission denied.")


def test_hub_id_offline_says_so_and_names_what_is_here(tmp_path, monkeypatch):
    import datasets.config

    assert datasets.config.HF_HUB_OFFLINE, "the suite runs with HF_HUB_OFFLINE=1"
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl")
    message = error_of("trane")
    assert "'trane' is no local path, and it cannot be loaded as a hub dataset" in message
    assert "HF_HUB_OFFLINE is set, so nothing was downloaded. Data files there: train.jsonl." in message


def test_a_configuration_name_is_refused_where_it_has_no_effect(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    assert "name='main' chooses a configuration of a hub dataset" in error_of(path, name="main")
    assert "but the source is a list. Drop it." in error_of(ROWS, name="main")
