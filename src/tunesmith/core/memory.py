"""The memory that a process uses, has used and may use, and pages of files that it no longer needs."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

from tunesmith.core.errors import SettingsError

__all__ = [
    "KERNEL_CACHES",
    "SHAPES_KEPT",
    "available_bytes",
    "forget_pages",
    "limit_kernel_caches",
    "parse_bytes",
    "peak_bytes",
    "resident_bytes",
    "trim_heap",
]

SHAPES_KEPT = 128
"""Shapes of products in 16 bits whose kernels a thread keeps; a step needs about 70 in each of two lanes."""
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""What limits the two caches, oneDNN's own and torch's in every thread: names in the environment."""


def peak_bytes() -> int:
    """Return the peak bytes on the GPU if one is in use, else the peak resident set of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    # ru_maxrss is the same, but a child process also inherits the peak of the one that started it.
    return _status("VmHWM") or _maximum_resident()


def resident_bytes() -> int:
    """Return the resident set of this process, or its peak where the system does not tell."""
    return _status("VmRSS") or _maximum_resident()


def available_bytes() -> int:
    """Return the bytes of main memory that this process could still get without swapping, limits of containers too."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _number(limit), _number(used)
        if most is not None and now is not None:
            free = min(free, max(0, most - now))
    return free


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Return the bytes of ``"8GiB"``, ``"16 GB"``, ``"512MiB"``.

    Raises:
        SettingsError: it is no positive number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)b?\s*", text.lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match is not None else 0
    if count < 1:
        raise SettingsError(f"memory {text!r}: write a number with a unit, for example 8GiB, 512MiB or 16GB.")
    return count


def forget_pages(ranges: Iterable[tuple[int, int]]) -> None:
    """Take the pages of ``(address, bytes)`` out of this process where they are views of a weights file.

    Reading there again reads the file. For weights whose values have gone elsewhere while other weights of the same
    file keep the mapping alive. Does nothing where the system has no ``/proc``.
    """
    ranges = list(ranges)
    files = _mapped_weights() if ranges else []
    library = ctypes.CDLL(None) if files else None
    for address, size in ranges:
        if library is None or not any(start <= address and address + size <= end for start, end in files):
            continue
        # Only whole pages: the first and last may hold a neighbour.
        first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        count = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if count > 0:
            library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(count), mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Give freed memory that the C library keeps back to the system; does nothing where it has no way to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def limit_kernel_caches() -> None:
    """Let torch keep the kernels of at most :data:`SHAPES_KEPT` shapes of products a thread.

    In 16 bits a CPU multiplies with oneDNN, which prepares a kernel for each shape: 0.4 ms, and then 0.4 MB that stay.
    Batches of unlike length bring new shapes with every step, and left alone oneDNN keeps 1,024 of them and torch as
    many in every thread, more than a gigabyte. Takes effect in threads that have not multiplied yet; values that the
    environment has already stay.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(SHAPES_KEPT))


def _mapped_weights() -> list[tuple[int, int]]:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    spans: list[tuple[int, int]] = []
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith(".safetensors"):
            start, _, end = line.split(maxsplit=1)[0].partition("-")
            spans.append((int(start, 16), int(end, 16)))
    return spans


def _status(name: str) -> int | None:
    file = Path("/proc/self/status")
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _maximum_resident() -> int:
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _number(file: str) -> int | None:
    try:
        return int(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
