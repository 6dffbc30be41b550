"""Rows of tasks other than language modelling: which columns they have, and what may stand in them.

A column is found by its usual name, or a mapping names it (``{"headline": "text", "is_sarcastic": "label"}``). A row
that lacks a column, or holds something else than a task takes, is one error with file and line: unlike a row that is
too long, it shows a mistake in the data. Read next: ``tasks.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tunesmith.core.errors import DataError
from tunesmith.core.names import did_you_mean
from tunesmith.data.files import Source, read_rows
from tunesmith.data.readers import kind_of
from tunesmith.data.types import SourceRow

__all__ = [
    "ROLES",
    "Record",
    "answers_of",
    "collect_labels",
    "label_name",
    "label_number",
    "read_records",
    "refuse_other_numbers",
]

# Task -> what its rows hold -> usual names of the column; a question mark: may be missing.
ROLES: dict[str, dict[str, tuple[str, ...]]] = {
    "SEQ_CLS": {"text": ("sentence", "sentence1"), "text_pair?": ("sentence2",), "label": ("labels",)},
    "TOKEN_CLS": {"tokens": ("words",), "tags": ("ner_tags", "labels")},
    "SEQ_2_SEQ_LM": {"source": ("input", "prompt", "text"), "target": ("output", "completion", "summary")},
    "QUESTION_ANS": {"question": (), "context": ("passage",), "answer": ("answers",), "answer_start?": ()},
    "FEATURE_EXTRACTION": {
        "anchor": ("query", "question", "sentence1"),
        "positive": ("answer", "passage", "sentence2"),
        "negative?": (),
    },
}


@dataclass(frozen=True, slots=True)
class Record:
    """One row: what it holds by role (:data:`ROLES`, without the question marks), and the place that it came from."""

    value: dict[str, Any]
    where: str


def read_records(
    source: Source,
    task: str,
    *,
    mapping: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
) -> Iterator[Record]:
    """Yield the rows of ``source`` (see :func:`tunesmith.data.files.read_rows`) as ``task`` takes them, in order.

    Raises:
        DataError: the mapping names what the task does not have, or a row lacks a column or has a wrong value in it.
    """
    roles = ROLES[task]
    _check_mapping(task, mapping or {})
    for number, row in enumerate(read_rows(source, split=split)):
        if limit is not None and number >= limit:
            return
        if task == "FEATURE_EXTRACTION" and not mapping:
            _refuse_judged(row)
        value: dict[str, Any] = {}
        for role, usual in roles.items():
            name = role.rstrip("?")
            column, is_optional = _column(row, name, usual, mapping or {}), role.endswith("?")
            held = None if column is None else row.value[column]
            if is_optional and isinstance(held, str) and not held.strip():
                continue  # a cell of a table that is left empty
            if held is not None:
                value[name] = _CHECKS.get(name, _text)(held, f"{row.where}: {column!r}")
            elif not is_optional:
                raise _missing(row, task, name, column, mapping)
        yield Record(value, row.where)


def collect_labels(records: Iterable[Record]) -> tuple[str, ...]:
    """Return the names of all labels or tags of ``records``, sorted, numbers by their value.

    Raises:
        DataError: there are fewer than two.
    """
    names: set[str] = set()
    for record in records:
        value = record.value.get("label", record.value.get("tags"))
        names.update(map(label_name, cast(list[Any], value) if isinstance(value, list) else [value]))
    if len(names) < 2:
        raise DataError(f"the rows have {len(names)} label ({', '.join(names)}): there is nothing to tell apart.")
    numbered = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbered else 0, name)))


def label_name(value: object) -> str:
    """Return the name of a label that is a text, a number or a truth value."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def label_number(value: object, labels: Sequence[str], where: str) -> int:
    """Return the number of a label: a name is looked up; a number too, unless no name is one, then it is the number.

    Raises:
        DataError: the model does not know it.
    """
    name = label_name(value)
    if name in labels:
        return labels.index(name)
    are_words = not any(label.isdecimal() for label in labels)
    if are_words and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    known = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    raise DataError(
        f"{where}: label {value!r} is none of the model's labels ({known}).{did_you_mean(name, labels)} Load the model "
        "with id2label, or mend the row."
    )


def refuse_other_numbers(source: Any, labels: Sequence[str]) -> None:
    """Refuse a ``datasets`` object whose column of classes gives the model's labels other numbers than the model does.

    Raises:
        DataError: naming both orders.
    """
    part = next(iter(source.values()), None) if isinstance(source, dict) else source
    for feature in (getattr(part, "features", None) or {}).values():
        names = getattr(getattr(feature, "feature", feature), "names", None)  # of a list of tags, or of a label
        if names and set(names) == set(labels) and list(names) != list(labels):
            own = dict(enumerate(names))
            raise DataError(
                f"the data set numbers its labels {', '.join(names)} and the model {', '.join(labels)}: label 0 would "
                f"be trained as {labels[0]!r}. Load the model with id2label={own}."
            )


def answers_of(record: Record) -> list[tuple[str, int | None]]:
    """Return the answers of a question with the characters at which they begin, None where the row does not say.

    An empty list means that the context holds no answer.
    """
    answer = record.value["answer"]
    if isinstance(answer, dict):  # as SQuAD has them
        known = cast(dict[str, Any], answer)
        return list(zip(known["text"], known["answer_start"], strict=True))
    if isinstance(answer, list):
        return [(text, None) for text in cast(list[str], answer)]
    return [(answer, record.value.get("answer_start"))] if answer else []


def _check_mapping(task: str, mapping: Mapping[str, str]) -> None:
    known = [role.rstrip("?") for role in ROLES[task]]
    for column, role in mapping.items():
        if role not in known:
            raise DataError(
                f"the mapping makes {column!r} the {role!r}, which {task} does not have. It has {', '.join(known)}."
                f"{did_you_mean(role, known)}"
            )
    twice = [role for role in known if list(mapping.values()).count(role) > 1]
    if twice:
        raise DataError(f"the mapping names two columns for {twice[0]!r}. {task} takes one.")


def _refuse_judged(row: SourceRow) -> None:
    """Refuse a pair that says how alike it is: pairs that are not would be trained as if they were."""
    judged = next((name for name in ("label", "labels", "score", "similarity_score") if name in row.value), None)
    if judged is not None and "positive" not in row.value:
        raise DataError(
            f"{row.where}: the pair has a {judged!r}, and FEATURE_EXTRACTION takes both texts of a row as alike. "
            "Keep the rows in which they are and leave the column out, or name the columns (--map "
            "sentence1=anchor --map sentence2=positive)."
        )


def _column(row: SourceRow, role: str, usual: tuple[str, ...], mapping: Mapping[str, str]) -> str | None:
    named = [column for column, target in mapping.items() if target == role]
    # A column that the mapping gives another role keeps it.
    names = named or [name for name in (role, *usual) if name not in mapping]
    return next((name for name in names if name in row.value), None)


def _missing(row: SourceRow, task: str, role: str, column: str | None, mapping: Mapping[str, str] | None) -> DataError:
    if column is not None:
        return DataError(f"{row.where}: {column!r} is null, and {task} rows need it. Fill it in, or remove the row.")
    needed = ", ".join(name for name in ROLES[task] if not name.endswith("?"))
    hint = did_you_mean(role, row.value)
    column = next((name for name in row.value if name not in (mapping or {})), "column")
    given = "" if not mapping else f", given: {', '.join(f'{name}={target}' for name, target in mapping.items())}"
    return DataError(
        f"{row.where}: {task} rows need {needed}, and this one has no {role}; its columns are "
        f"{', '.join(row.value) or 'none'}.{hint} Say which column it is, for example --map {column}={role} "
        f"(in Python mapping={{{column!r}: {role!r}}}{given})."
    )


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} is {kind_of(value) if not isinstance(value, str) else 'empty'}; a text is needed.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where} holds half of a surrogate pair, which is no character. Repair the text.")
    return value


def _label(value: object, where: str) -> str | int:
    if isinstance(value, bool):
        return label_name(value)
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise DataError(f"{where} is {kind_of(value)}; a label is a text or a whole number.")
    return value


def _words(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {kind_of(value)}; a list of words is needed, with at least one.")
    return [_text(word, f"{where}, word {number}") for number, word in enumerate(cast(list[Any], value), 1)]


def _tags(value: object, where: str) -> list[str | int]:
    if not isinstance(value, list):
        raise DataError(f"{where} is {kind_of(value)}; a list of tags is needed, one a word.")
    return [_label(tag, f"{where}, tag {number}") for number, tag in enumerate(cast(list[Any], value), 1)]


def _answer(value: object, where: str) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_text(text, where) for text in cast(list[Any], value)]
    if isinstance(value, dict) and {"text", "answer_start"} <= set(cast(dict[str, Any], value)):
        known = cast(dict[str, Any], value)
        texts, starts = known["text"], known["answer_start"]
        if isinstance(texts, list) and isinstance(starts, list) and len(cast(Any, texts)) == len(cast(Any, starts)):
            return {"text": [_text(text, where) for text in cast(list[Any], texts)],
                    "answer_start": [_start(start, where) for start in cast(list[Any], starts)]}  # fmt: skip
    raise DataError(
        f"{where} is {kind_of(value)}; an answer is a text, a list of texts, or as in SQuAD an object with the lists "
        "text and answer_start."
    )


def _start(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{where} is {kind_of(value)}; the number of the answer's first character is needed.")
    return value


_CHECKS: dict[str, Any] = {
    "label": _label,
    "tokens": _words,
    "tags": _tags,
    "answer": _answer,
    "answer_start": _start,
}
