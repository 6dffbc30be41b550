"""Folders that are written whole or not at all.

    with whole_folder(path) as temporary: ...

fills ``.<name>.partial-<pid>`` beside ``path``, writes a manifest with the size and SHA-256 of every file, flushes all
of it to disk and renames. A reader that finds ``path`` with a manifest whose sizes and sums agree has a folder that
some process finished; anything else is damage and says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator
from pathlib import Path

from tunesmith.core.errors import OutputError

__all__ = [
    "MANIFEST",
    "as_output_error",
    "damage",
    "free_bytes",
    "lasting_path",
    "lock",
    "make_folder",
    "require_new",
    "require_space",
    "require_writable",
    "sha256",
    "whole_folder",
    "write_text",
]

MANIFEST = "manifest.json"
_PARTIAL = re.compile(r"\.(.+)\.partial-\d+")


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Return the bytes free for this user on the disk that holds ``folder`` or its nearest existing parent."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_new(folder: Path) -> None:
    """Raise :class:`OutputError` when ``folder`` is there already and holds something, or is no folder."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise OutputError(f"{folder} is there already. Choose another folder, or remove it first.")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise :class:`OutputError` when the disk under ``folder`` has fewer than ``needed`` bytes free."""
    free = free_bytes(folder)
    if free < needed:
        raise OutputError(
            f"{what} needs {needed / 2**20:.0f} MiB and the disk of {folder} has {free / 2**20:.0f} MiB free. "
            "Free some space or choose another output_dir."
        )


def require_writable(folder: Path) -> None:
    """Raise :class:`OutputError` when ``folder``, which need not exist, cannot be made or written to."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(f"cannot write {folder}: {nearest} is a file. Choose another folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {folder}: {_WRITE_PROBLEMS[errno.EACCES]}")


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents where they are missing, or raise :class:`OutputError`."""
    with as_output_error(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole: a crash leaves the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with as_output_error(path):
            temporary.write_text(text, encoding="utf-8")
            _flush(temporary)
            temporary.replace(path)
    except OutputError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def lock(path: Path, *, waits: bool = True) -> Generator[None]:
    """Hold the lock file ``path`` for the block, waiting for whoever holds it; the lock of a dead process is free.

    Raises:
        OutputError: another process holds it, where ``waits`` is False.
    """
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            raise OutputError(
                f"another process is writing to {path.parent}. Wait until it is done, or choose another folder."
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """Yield a temporary folder beside ``path`` that becomes ``path`` when the block ends without an error.

    An existing ``path`` is replaced only at that moment. Partial folders of dead processes are removed first. One
    process at a time may write a ``path``: who may meet another takes a :func:`lock`.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_up_after_a_crash(path)
        temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
        temporary.mkdir()
    try:
        with as_output_error(path):
            yield temporary
            _seal(temporary)
            retired = path.with_name(f".{path.name}.replaced")
            if path.exists():
                path.rename(retired)
            temporary.rename(path)
            _flush(path.parent)
            shutil.rmtree(retired, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def lasting_path(path: Path) -> Path:
    """Return the absolute path that a file or folder will have when every :func:`whole_folder` around it is done."""
    parts = [match[1] if (match := _PARTIAL.fullmatch(part)) else part for part in path.absolute().parts]
    return Path(*parts)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a folder written by :func:`whole_folder`, or None when every byte is as written."""
    try:
        entries: dict[str, dict[str, object]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        written = [(name, entry["bytes"], entry["sha256"]) for name, entry in entries.items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, size, checksum in written:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
        if sha256(file) != checksum:
            return f"{name} has another checksum than when it was written"
    return None


def _clean_up_after_a_crash(path: Path) -> None:
    retired = path.with_name(f".{path.name}.replaced")
    if retired.exists() and not path.exists():
        retired.rename(path)
    for stale in [retired, *path.parent.glob(f".{path.name}.partial-*")]:
        shutil.rmtree(stale, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Write the manifest and flush every file and folder below ``folder`` to disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    for entry in [*files, manifest, *(child for child in folder.rglob("*") if child.is_dir()), folder]:
        _flush(entry)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_NEARLY_NOTHING = 2**20
_WRITE_PROBLEMS = {
    errno.ENOSPC: "the disk is full. Free some space or choose another folder.",
    errno.EDQUOT: "the disk quota is used up. Free some space or choose another folder.",
    errno.EACCES: "no permission to write there. Choose a folder that you may write to.",
    errno.EPERM: "no permission to write there. Choose a folder that you may write to.",
    errno.EROFS: "the file system is read-only. Choose another folder.",
    errno.ENOTDIR: "part of the path is a file. Choose another folder.",
    errno.ENOENT: "no folder can be made there. Choose another folder.",
    errno.EEXIST: "a file of that name is in the way. Choose another folder.",
    errno.ENAMETOOLONG: "the name is too long. Choose a shorter one.",
}


@contextlib.contextmanager
def as_output_error(path: Path) -> Generator[None]:
    """Say in one sentence why ``path`` cannot be written; errors of other kinds pass."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno not in _WRITE_PROBLEMS:
            raise
        raise OutputError(f"cannot write {path}: {_WRITE_PROBLEMS[error.errno]}") from error
    except Exception as error:
        # torch and safetensors wrap a full disk in errors of their own.
        wraps = type(error).__name__ in ("RuntimeError", "SafetensorError")
        if not wraps or ("No space left" not in str(error) and free_bytes(path) > _NEARLY_NOTHING):
            raise
        raise OutputError(f"cannot write {path}: {_WRITE_PROBLEMS[errno.ENOSPC]}") from error
