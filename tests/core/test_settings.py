from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from tunesmith.core.errors import SettingsError
from tunesmith.core.settings import (
    Guide,
    Settings,
    describe_type,
    first_clause,
    guide_of,
    parse_assignment,
    read_yaml,
    validate,
)


class Example(Settings):
    rank: Annotated[int, Field(ge=1), Guide("8 to 64", "little", "much")] = 16
    """Width of the adapter.

    A second paragraph that no list shows.
    """
    rate: float = 0.1
    """Step size."""
    on: bool | Literal["auto"] = True
    """A switch."""
    name: str
    """What it is called."""
    lists: list[str] | None = None
    """Some names."""


def test_defaults_and_descriptions() -> None:
    example = validate(Example, {"name": "x"})
    assert (example.rank, example.rate, example.on) == (16, 0.1, True)
    assert guide_of(Example.model_fields["rank"]) == Guide("8 to 64", "little", "much")
    assert guide_of(Example.model_fields["name"]) == Guide()
    assert (Example.model_fields["rate"].description or "") == "Step size."


def test_one_problem_is_one_line() -> None:
    with pytest.raises(SettingsError) as caught:
        validate(Example, {"name": "x", "rnak": 3}, source="run.yaml")
    assert str(caught.value) == "run.yaml: unknown key 'rnak'. Did you mean 'rank'?"


def test_many_problems_come_together() -> None:
    with pytest.raises(SettingsError) as caught:
        validate(Example, {"rank": 0, "rate": "fast", "on": 3, "lists": [1], "other": 1})
    lines = str(caught.value).splitlines()
    assert lines[0] == "settings: 6 problems"
    assert len(lines) == 7
    text = str(caught.value)
    assert "rank = 0: input should be greater than or equal to 1" in text
    assert "rate = 'fast': a number is needed" in text
    assert "on = 3: true or false or auto is needed" in text, text
    assert "name is missing: What it is called." in text
    assert "lists = 1: a list or nothing is needed" in text or "lists = [1]: a list or nothing is needed" in text


@pytest.mark.parametrize("field", ["rank", "rate"])
def test_a_truth_value_is_no_number(field: str) -> None:
    with pytest.raises(SettingsError, match=f"{field} = True: True is a truth value, a number is needed"):
        validate(Example, {"name": "x", field: True})


def test_settings_are_frozen_and_replaced_with_checks() -> None:
    example = validate(Example, {"name": "x"})
    assert example.replace(rank=2).rank == 2
    assert example.rank == 16
    with pytest.raises(SettingsError, match="rank = 0"):
        example.replace(rank=0)
    with pytest.raises(ValueError, match="frozen"):
        example.rank = 3


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(SettingsError) as caught:
        validate(Example, {"name": ["y" * 500]})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("annotation", "words"),
    [(int, "a whole number"), (int | None, "a whole number or nothing"), (list[str] | str, "a list or a text"),
     (Literal["a", "b"], "one of a, b"), (dict[str, int], "a mapping"), (Annotated[float, 1], "a number"),
     (Path, "a path"), (Any, "what transformers takes")],
)  # fmt: skip
def test_types_in_words(annotation: Any, words: str) -> None:
    assert describe_type(annotation) == words


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("A folder,\nor a name (a,\nb). More.", "A folder, or a name (a, b)"),
        ("Directions (of each; fast), more; none: off.", "Directions (of each; fast), more"),
        ("By number, 0, 1, 2 ... and on. More", "By number, 0, 1, 2 ... and on"),
        ("A .jsonl file at 0.5", "A .jsonl file at 0.5"),
    ],
)
def test_the_first_clause_of_a_docstring(text: str, clause: str) -> None:
    assert first_clause(text) == clause


def write(folder: Path, content: bytes) -> Path:
    file = folder / "run.yaml"
    file.write_bytes(content)
    return file


def test_a_mapping_is_read(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, b"a: 1\nb: [x, y]\n")) == {"a": 1, "b": ["x", "y"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty. A run needs at least `model` and `data`"),
        (b"- a\n", "a mapping of `key: value` lines is needed, not a list"),
        (b"a: 1\nb: 2\na: 3\n", r"run.yaml:3: 'a' is already set in line 1. Keep one"),
        (b"a: [1\nb: 2\n", r"run.yaml:\d:\d+: not valid YAML"),
        (b"a: \xff\n", r"not UTF-8 text \(byte 3\)"),
        (b"a: !!python/object/apply:os.getcwd []\n", "not valid YAML: could not determine a constructor"),
    ],
)
def test_files_that_cannot_be_read(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        read_yaml(write(tmp_path, content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("? [a, b]\n: c\n", ":1: a key must be a name, not a list or a mapping"),
        ("? {a: b}\n: c\n", ":1: a key must be a name, not a list or a mapping"),
        ("output_dir: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        ("a: " + "[" * 3000 + "\n", "not valid YAML"),
    ],
)
def test_yaml_that_its_library_stumbles_over(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=message):
        read_yaml(tmp_path / "run.yaml")


def test_paths_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for path in (tmp_path / "file" / "run.yaml", tmp_path / ("x" * 300)):
        with pytest.raises(SettingsError, match="cannot be read"):
            read_yaml(path)
    with pytest.raises(SettingsError, match="the value is not valid YAML"):
        parse_assignment("model=2024-13-45")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(SettingsError, match="is a folder"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("r=8", ("r", 8)), ("learning_rate=1.0e-4", ("learning_rate", 1e-4)), ("a=[x, y]", ("a", ["x", "y"])),
     ("a=null", ("a", None)), ("a=b=c", ("a", "b=c")), ("a=", ("a", None)), ("a=true", ("a", True))],
)  # fmt: skip
def test_assignments(text: str, expected: tuple[str, Any]) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["r", "=8", "a=[x"])
def test_what_is_no_assignment(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--set "):
        parse_assignment(text)


def test_numbers_as_people_write_them() -> None:
    """YAML 1.1 reads 1e-4 as a text; a number field takes it all the same."""
    name, value = parse_assignment("rate=1e-4")
    assert validate(Example, {"name": "x", name: value}).rate == 1e-4
