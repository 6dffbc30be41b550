"""Any source of rows - a file, a folder, a hub id, a ``datasets`` object, a list - as one stream of :class:`SourceRow`.

Local paths come first; the hub is asked only for a name that is no local path. One file or one list has the single
split ``"train"``; a folder has the splits whose files it holds (``train.jsonl``, ``valid.csv``, ...); a ``DatasetDict``
has those it names. How a file is parsed is in ``readers.py``; what a row means in ``formats.py``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from tunesmith.core.errors import DataError
from tunesmith.core.names import did_you_mean
from tunesmith.data.readers import SUFFIXES, kind_of, read_file, without_nested_nulls
from tunesmith.data.types import SourceRow

__all__ = ["Source", "formatted_rows", "has_valid", "list_splits", "read_rows"]

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A path, a hub id, a ``datasets`` object, or dicts."""

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "eval", "dev"),
    "test": ("test",),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def read_rows(source: Source, *, split: str = "train", name: str | None = None) -> Iterator[SourceRow]:
    """Return the rows of ``source``, in order; what is wrong with the source itself is raised before the first row.

    Args:
        source: a ``.jsonl .json .csv .parquet .arrow .txt`` file; a folder with ``train.*`` and, if wanted,
            ``valid.*`` (or validation, val, eval, dev) and ``test.*``; the id of a dataset on the hub; a ``datasets``
            object; a list or any iterable of dicts. A ``.txt`` file is paragraphs separated by blank lines, each a row
            ``{"text": ...}``.
        split: ``"train"``, ``"valid"`` or ``"test"`` (aliases as above), or a name that the ``datasets`` object uses.
        name: configuration of a hub dataset that has several.

    Raises:
        DataError: nothing is there (with the nearest name), the split does not exist, or, while iterating, a file is
            malformed, a row is no object, or there is no row at all.
    """
    if isinstance(source, (str, os.PathLike)):
        found = _locate(source, name=name)
        if isinstance(found, Path):
            file = _split_file(found, split) if found.is_dir() else _only_train(found, split, str(found))
            return _not_empty(read_file(file), str(file))
        source, label = found, str(source)
    else:
        _refuse_name(name, kind_of(source))
        label = "the dataset"
    splits = _dataset_splits(source)
    if splits is not None:
        chosen = _match_split(split, splits, label)
        return _not_empty(_dataset_rows(splits[chosen], label), f"{label}, split {chosen!r}")
    if _is_dataset(source):
        return _not_empty(_dataset_rows(_only_train(source, split, label), label), label)
    return _not_empty(_object_rows(_only_train(source, split, "a list of rows")), "the list of rows")


def formatted_rows(source: Source, function: Callable[[Mapping[str, Any]], Any]) -> Iterator[dict[str, Any]]:
    """Return rows of the text, or of each text, that ``function`` makes of a row, alone or as ``{"text": ...}``.

    A function that takes columns of many rows, as ``datasets.map(batched=True)`` gives them, is called with each row as
    a batch of one; it is known by making one text of such a batch, and of the row itself none or texts that show less.

    Raises:
        DataError: it makes something else.
    """
    is_batched: bool | None = None
    for row in read_rows(source):
        if is_batched is None:
            is_batched = _takes_batches(function, row.value)
        made = function({name: [value] for name, value in row.value.items()} if is_batched else row.value)
        texts = _texts_of(made)
        if texts is None:
            raise DataError(
                f"{row.where}: formatting_func returned {kind_of(made)}. It must return a text, or a list of texts."
            )
        yield from ({"text": text} for text in texts)


def _texts_of(made: Any) -> list[str] | None:
    """Return the texts that a formatting function has made, None where it made something else."""
    made = made["text"] if isinstance(made, Mapping) and list(made) == ["text"] else made
    texts = [made] if isinstance(made, str) else made
    is_list = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
    return list(texts) if is_list else None


def _takes_batches(function: Callable[[Mapping[str, Any]], Any], value: Mapping[str, Any]) -> bool:
    """Return whether ``function`` shows more of a row when it gets columns: of the texts alone it sees letters."""
    alone = _tried(function, value)
    batch = _tried(function, {name: [cell] for name, cell in value.items()})
    if batch is None or len(batch) != 1 or not alone:
        return batch is not None and len(batch) == 1
    held = _texts_in(value)
    # A function may take only the beginning or the end of a text.
    as_row, as_batch = (
        sum(text[:8] in made or text[-8:] in made for text in held) for made in ("\n".join(alone), batch[0])
    )
    return as_batch > as_row or (as_row == 0 and len(alone) != 1)


def _tried(function: Callable[[Mapping[str, Any]], Any], value: Mapping[str, Any]) -> list[str] | None:
    try:
        return _texts_of(function(value))
    except Exception:  # whatever a function may raise that is given what it was not written for
        return None


def _texts_in(value: object) -> list[str]:
    """Return every text of two characters or more inside a row."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        item: Any = waiting.pop()
        if isinstance(item, str) and len(item) > 1:
            found.append(item)
        elif isinstance(item, (Mapping, list, tuple)):
            waiting.extend(item.values() if isinstance(item, Mapping) else item)
    return found


def list_splits(source: Source, *, name: str | None = None) -> tuple[str, ...]:
    """Return the splits that :func:`read_rows` can give, ``"train"`` first; common aliases come as train, valid, test.

    Raises:
        DataError: nothing is there.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _locate(source, name=name)
    if isinstance(source, Path):
        found = [split for split, _ in _folder_files(source)] if source.is_dir() else ["train"]
    else:
        splits = _dataset_splits(source)
        found = ["train"] if splits is None else [_canonical(split) for split in splits]
    order = list(_SPLIT_NAMES)
    return tuple(sorted(set(found), key=lambda split: (order.index(split) if split in order else len(order), split)))


def has_valid(source: Source) -> bool:
    """Return whether ``source`` is a local folder with a valid file of its own."""
    return isinstance(source, (str, os.PathLike)) and os.path.isdir(_path(source)) and "valid" in list_splits(source)


def _not_empty(rows: Iterator[SourceRow], label: str) -> Iterator[SourceRow]:
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        raise DataError(f"{label} holds no rows. At least one is needed.")


# --- paths ------------------------------------------------------------------------------------------------------------


def _locate(source: str | os.PathLike[str], *, name: str | None) -> Any:
    """Return the existing :class:`Path`, or the dataset that the hub has under this name."""
    path = _path(source)
    if os.path.isfile(path) or os.path.isdir(path):  # unlike Path's, these answer no where a name is too long
        _refuse_name(name, f"the local path {path}")
        return path
    is_hub_id = isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix.lower() not in SUFFIXES
    if is_hub_id:
        return _load_from_hub(cast(str, source), name)
    raise DataError(f"no data at {os.fspath(source)!r}.{_nearby(path)} {_ACCEPTED}")


def _path(source: str | os.PathLike[str]) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:  # a name that begins with ~ and no user's
        return Path(source)


def _nearby(path: Path) -> str:
    """Say what stands where ``path`` was looked for."""
    parent = path.parent
    if not os.path.isdir(parent):
        return f" The folder {os.fspath(parent)!r} does not exist."
    names = sorted(os.listdir(parent))
    readable = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
    listed = f" Data files there: {', '.join(readable[:6])}{' ...' if len(readable) > 6 else ''}." if readable else ""
    return did_you_mean(path.name, names) + listed


def _split_file(folder: Path, split: str) -> Path:
    files = _folder_files(folder)
    wanted = _canonical(split)
    found = [file for name, file in files if name == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(file.name for file in found)
        raise DataError(f"{folder} holds {names}, both for the split {wanted!r}. Keep one, or name the file itself.")
    have = sorted({name for name, _ in files})
    near = did_you_mean(split, have)
    raise DataError(f"{folder} has no file for the split {split!r}; it has {', '.join(have)}.{near}")


def _folder_files(folder: Path) -> list[tuple[str, Path]]:
    """Return ``(split, file)`` for every file that is named after a split."""
    known = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES and file.is_file()]
    files = [(_canonical(file.stem), file) for file in known if _canonical(file.stem) in _SPLIT_NAMES]
    if files:
        return files
    there = ", ".join(file.name for file in known[:6]) or "no data file at all"
    raise DataError(
        f"the folder {folder} holds no train, valid or test file ({', '.join(SUFFIXES)}); there is {there}. "
        "Rename one to train.jsonl or the like, or name the file itself."
    )


def _canonical(split: str) -> str:
    return next((name for name, aliases in _SPLIT_NAMES.items() if split.lower() in aliases), split)


def _only_train(source: Any, split: str, label: str) -> Any:
    if _canonical(split) != "train":
        raise DataError(f"{label} has only the split 'train', not {split!r}. Name the file of that split instead.")
    return source


def _refuse_name(name: str | None, label: str) -> None:
    if name is not None:
        raise DataError(f"name={name!r} chooses a configuration of a hub dataset, but the source is {label}. Drop it.")


# --- objects ----------------------------------------------------------------------------------------------------------


def _object_rows(source: Any) -> Iterator[SourceRow]:
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        raise DataError(f"rows must be a list of dicts, not {kind_of(source)}. {_ACCEPTED}")
    if type(source).__name__ == "DataFrame":  # of pandas or polars: it is no stream of rows but of columns
        raise DataError("a DataFrame is no list of rows. Give datasets.Dataset.from_pandas(frame), or a list of dicts.")
    for number, row in enumerate(cast(Iterable[object], source), 1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number}: a row must be a dict, this is {kind_of(row)}.")
        values = cast(Mapping[str, Any], row)
        yield SourceRow({name: _without_numpy(value) for name, value in values.items()}, f"row {number}")


def _without_numpy(value: Any) -> Any:
    """Return numbers and one-dimensional arrays of numpy, as pandas holds rows, as Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return [_without_numpy(entry) for entry in value] if value.dtype == object else value.tolist()
    if isinstance(value, dict):
        return {name: _without_numpy(entry) for name, entry in value.items()}
    return value


def _dataset_rows(dataset: Any, label: str) -> Iterator[SourceRow]:
    # A transform (``set_transform``) says what a row is; other formats only say as which arrays it comes.
    is_transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"
    for number, row in enumerate(dataset if is_transformed else dataset.with_format(None), 1):
        yield SourceRow(without_nested_nulls(row), f"{label} row {number}")


def _dataset_splits(source: Any) -> Mapping[str, Any] | None:
    """Return the splits of a ``DatasetDict`` or ``IterableDatasetDict``; None for anything else."""
    datasets = sys.modules.get("datasets")  # nobody can hold one of its objects without having imported it
    if datasets is not None and isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return cast(Mapping[str, Any], source)
    return None


def _is_dataset(source: Any) -> bool:
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, (datasets.Dataset, datasets.IterableDataset))


def _match_split(wanted: str, splits: Iterable[str], label: str) -> str:
    available = list(splits)
    if wanted in available:
        return wanted
    found = [split for split in available if _canonical(split) == _canonical(wanted)]
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{label} has no split {wanted!r}; it has {', '.join(map(repr, available))}.{did_you_mean(wanted, available)}"
    )


def _load_from_hub(hub_id: str, name: str | None) -> Any:
    import datasets
    import datasets.config
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(hub_id, name)
    # What the hub, the network and the dataset's own files raise has no common base beyond these.
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        offline = " HF_HUB_OFFLINE is set, so nothing was downloaded." if datasets.config.HF_HUB_OFFLINE else ""
        raise DataError(
            f"{hub_id!r} is no local path, and it cannot be loaded as a hub dataset: {first_line[:300]}.{offline}"
            f"{_nearby(Path(hub_id))} {_ACCEPTED}"
        ) from error


_ACCEPTED = (
    f"Give a {', '.join(SUFFIXES)} file, a folder with train.jsonl or the like, a datasets object, or a list of dicts."
)
