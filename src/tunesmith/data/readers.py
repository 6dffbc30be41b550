"""One data file in, rows out: ``.jsonl .json .csv .parquet .arrow .txt``.

JSON is parsed here line by line and never goes through Arrow, which fills keys that a row lacks with null. Rows that
do come from Arrow (``.parquet``, ``.arrow``, ``datasets``) lose the null fields of nested objects again, because nobody
can tell a written null from an invented one there; a null in a top-level column stays.

A file that cannot be read to its end is an error that names file and line, never a shorter data set. Which file is read
is decided in ``files.py``; what a row means in ``formats.py``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.core.names import did_you_mean
from tunesmith.data.types import SourceRow

__all__ = ["SUFFIXES", "kind_of", "read_file", "without_nested_nulls"]

_BOM = b"\xef\xbb\xbf"
_ROW_LISTS = ("data", "rows", "train")
# The csv module's own limit is 131,072 characters a cell; a conversation in one cell can be longer. 2**31 - 1 is the
# largest value that every platform takes.
_LARGEST_CELL = 2**31 - 1


def read_file(path: Path) -> Iterator[SourceRow]:
    """Yield the rows of one file, in order, as its suffix says.

    Raises:
        DataError: the suffix is unknown, or the file is empty, unreadable, not UTF-8 or malformed. The message names
            the file and, where there is one, the line.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files of type {path.suffix or 'without a suffix'!r} are not read. Accepted are "
            f"{', '.join(SUFFIXES)}.{did_you_mean(path.suffix, SUFFIXES)}"
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes). Was it written, copied or downloaded completely?")
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def kind_of(value: object) -> str:
    """Name the JSON type of ``value`` for a message: ``"null"``, ``"a number"``, ``"a list"`` ..."""
    if value is None:
        return "null"
    for types, kind in _KINDS:
        if isinstance(value, types):
            return kind
    return f"a {type(value).__name__}"


def without_nested_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return ``row`` without the null fields of objects inside its columns (see the top of this file)."""
    return {key: _drop_nulls(value) for key, value in row.items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_drop_nulls(entry) for entry in value]
    return value


# --- text -------------------------------------------------------------------------------------------------------------


def _decode(raw: bytes, path: Path, *, line: int = 1, offset: int = 0) -> str:
    """Decode UTF-8; ``line`` and ``offset`` say where ``raw`` begins in the file."""
    try:
        return raw.removeprefix(_BOM if offset == 0 else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + (len(_BOM) if offset == 0 and raw.startswith(_BOM) else 0)
        line += raw.count(b"\n", 0, at)
        guess = " It begins like UTF-16." if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        raise DataError(
            f"{path.name}:{line}: not valid UTF-8: byte 0x{raw[at]:02x} at offset {offset + at} of the file.{guess} "
            f"Save it as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > fixed{path.suffix}"
        ) from error


def _read_text(path: Path) -> Iterator[SourceRow]:
    """Paragraphs, separated by blank lines; each is one row ``{"text": ...}``."""
    paragraph: list[str] = []
    start = 1
    text = _decode(path.read_bytes(), path).replace("\r\n", "\n")
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield SourceRow({"text": "\n".join(paragraph)}, f"{path.name}:{start}")
            paragraph = []


# --- JSON -------------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Iterator[SourceRow]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = _decode(raw, path, line=number, offset=offset)
            offset += len(raw)
            if not text.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                value = _parse(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not valid JSON: {_explain(error)}") from error
            except _BadJSON as error:
                raise DataError(f"{place}: {error}") from error
            yield _json_row(value, place, hint=" A file that is one JSON list must be named .json.")


def _read_json(path: Path) -> Iterator[SourceRow]:
    """Read a list of rows, an object that holds one such list, or JSON lines under this suffix."""
    text = _decode(path.read_bytes(), path)
    try:
        document = _parse(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].strip().startswith("{"):
            yield from _read_jsonl(path)
            return
        raise DataError(f"{path.name}:{error.lineno}: not valid JSON: {_explain(error)}") from error
    except _BadJSON as error:
        raise DataError(f"{path.name}: {error}") from error
    for number, value in enumerate(_row_list(document, path), 1):
        yield _json_row(value, f"{path.name} row {number}", hint="")


def _row_list(document: Any, path: Path) -> list[Any]:
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise DataError(f"{path.name}: a .json file must hold a list of rows, not {kind_of(document)}.")
    found = [key for key in _ROW_LISTS if isinstance(document.get(key), list)]
    if len(found) == 1:
        return document[found[0]]
    keys = ", ".join(repr(key) for key in list(document)[:8])
    raise DataError(
        f"{path.name}: a .json file must hold a list of rows, or an object with one list under 'data', 'rows' or "
        f"'train'. This object has the keys {keys}. For one row a line, name the file .jsonl."
    )


def _json_row(value: Any, place: str, *, hint: str) -> SourceRow:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row must be a JSON object like {{...}}, this is {kind_of(value)}.{hint}")
    return SourceRow(value, place)


def _explain(error: json.JSONDecodeError) -> str:
    ends_early = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
    hint = " The row ends in the middle: was the file written, copied or downloaded completely?" if ends_early else ""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}.{hint}"


class _BadJSON(ValueError):
    """JSON that Python's parser takes, or stumbles over, but that we refuse; the text is a full sentence."""


def _parse(text: str) -> Any:
    """Parse strict JSON: no NaN, no doubled keys, which Python would take in silence."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (json.JSONDecodeError, _BadJSON):
        raise
    except RecursionError as error:
        raise _BadJSON("the JSON is nested too deeply to be a row.") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise _BadJSON(f"not valid JSON: {error}.") from error


def _refuse_constant(literal: str) -> Any:
    raise _BadJSON(f"not valid JSON: {literal} is no JSON value. Write null, or leave the key out.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _BadJSON(f"the key {twice[:60]!r} stands twice in one object. Keep one of them.")
    return value


# --- tables -----------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Iterator[SourceRow]:
    """Comma-separated cells with a header line; every cell is text, an empty one is ``""``."""
    text = _decode(path.read_bytes(), path)
    records = _csv_records(text, path)
    if not records:
        raise DataError(f"{path.name} holds no header line. The first line must name the columns.")
    header = [name.strip() for name in records[0][1]]
    _check_header(header, path)
    for line, cells in records[1:]:
        if len(cells) != len(header):
            raise DataError(
                f"{path.name}:{line}: {len(cells)} cells, but the header names {len(header)} columns. Put a cell that "
                'holds commas, quotes or line breaks into double quotes ("" for a quote).'
            )
        yield SourceRow(dict(zip(header, cells, strict=True)), f"{path.name}:{line}")


def _csv_records(text: str, path: Path) -> list[tuple[int, list[str]]]:
    """Return ``(first line, cells)`` of every record that is not blank."""
    records: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        with _large_cells():
            for cells in reader:
                if cells:
                    records.append((start, cells))
                start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path.name}:{start}: not valid CSV: {error}.") from error
    return records


@contextmanager
def _large_cells() -> Generator[None, None, None]:
    """Raise the process-wide limit of the csv module while one file is parsed."""
    before = csv.field_size_limit(_LARGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_header(header: list[str], path: Path) -> None:
    place = f"{path.name}:1"
    if "" in header:
        raise DataError(f"{place}: column {header.index('') + 1} of the header has no name. Name every column.")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{place}: the header names the column {twice!r} twice. Give each its own name.")
    for separator, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise DataError(f"{place}: the columns are separated by {called}. Save the file with commas.")


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=1024)

    return _arrow_rows(path, batches)


def _read_arrow(path: Path) -> Iterator[SourceRow]:
    """Arrow IPC, as a stream (what ``datasets`` writes) or as a file (what ``feather`` writes)."""
    from pyarrow import ipc

    def batches() -> Iterator[Any]:
        with path.open("rb") as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                table = ipc.open_file(file)
                yield from (table.get_batch(index) for index in range(table.num_record_batches))
            else:
                yield from ipc.open_stream(file)

    return _arrow_rows(path, batches)


def _arrow_rows(path: Path, open_batches: Callable[[], Any]) -> Iterator[SourceRow]:
    """Yield the rows of record batches, each checked before it is believed."""
    import pyarrow

    number = 0
    try:
        for batch in open_batches():
            # Damaged offsets would be read as memory addresses: full validation costs less than the conversion below.
            batch.validate(full=True)
            names = batch.schema.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}: the column {twice!r} stands there twice. Give each column its own name.")
            for value in batch.to_pylist():
                number += 1
                yield SourceRow(without_nested_nulls(value), f"{path.name} row {number}")
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError, MemoryError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        place = f"{path}, after row {number}"
        raise DataError(f"{place}: damaged, or no {path.suffix} file: {first_line[:200]}.") from error


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    (str, "text"),
    ((int, float), "a number"),
    ((list, tuple), "a list"),
    (dict, "an object"),
)
_READERS: dict[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
SUFFIXES = tuple(_READERS)
