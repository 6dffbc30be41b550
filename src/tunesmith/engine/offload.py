"""Where a layer's input waits between forward and backward under ``Policy.OFFLOAD``.

On a GPU: pinned host memory, copied on a stream of its own; the layer below is fetched while the one above computes.
On a CPU: a file in ``temporary_location``, since there is no second memory; the file is deleted while it is open, so
that nothing is left behind however the process ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import OutputError
from tunesmith.core.files import require_space, require_writable

__all__ = ["HostStore"]


@dataclass(slots=True)
class _Ticket:
    """A tensor that was put away: where it is, and how to make it again."""

    place: Any
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    ready: Any = None
    fetched: torch.Tensor | None = None
    below: _Ticket | None = None


class HostStore:
    """Puts tensors away and gives them back, each once or more; belongs to one engine."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder: Path | None = None
        self.move_to(folder)
        self._file: _File | None = None
        self._streams: tuple[Any, Any] | None = None
        self._pinned: list[torch.Tensor] = []
        self._newest: _Ticket | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model starts with a store of its own: an open file cannot be copied.
        return HostStore, (self._folder,)

    def move_to(self, folder: str | Path | None) -> None:
        """Use ``folder`` for the file that the next first :meth:`put` makes; None is the system's temporary folder.

        Raises:
            OutputError: it is a file, or cannot be made or written to.
        """
        self._folder = None if folder is None else Path(folder).expanduser()
        if self._folder is not None:
            require_writable(self._folder)

    def put(self, x: torch.Tensor) -> _Ticket:
        """Copy ``x`` away and return the ticket for it; ``x`` must not be changed in place afterwards."""
        return self._put_pinned(x) if x.device.type == "cuda" else self._put_file(x)

    def get(self, ticket: _Ticket) -> torch.Tensor:
        """Return the tensor of ``ticket``."""
        if ticket.device.type == "cuda":
            return self._get_pinned(ticket)
        assert self._file is not None
        return self._file.read(ticket.place, ticket.shape, ticket.dtype)

    def close(self) -> None:
        """Give file and pinned memory back."""
        if self._file is not None:
            self._file.close()
        self._file, self._streams, self._newest = None, None, None
        self._pinned.clear()

    # ---- CPU: a file ----

    def _put_file(self, x: torch.Tensor) -> _Ticket:
        if self._file is None:
            self._file = _File(self._folder)
        return _Ticket(self._file.write(x), x.shape, x.dtype, x.device)

    # ---- CUDA: pinned memory ----

    def _put_pinned(self, x: torch.Tensor) -> _Ticket:
        if self._streams is None:
            self._streams = torch.cuda.Stream(x.device), torch.cuda.Stream(x.device)
        out = self._streams[0]
        # A slab is free again when its ticket's autograd node is gone; torch's pinned allocator keeps them for us.
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        out.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(out):
            host.copy_(x, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(out)
        x.record_stream(out)
        ticket = _Ticket(host, x.shape, x.dtype, x.device, ready, None, self._newest)
        self._newest = ticket
        return ticket

    def _get_pinned(self, ticket: _Ticket) -> torch.Tensor:
        x = self._fetch(ticket)
        if ticket.below is not None and ticket.below.fetched is None:
            self._fetch(ticket.below)  # while the caller computes this layer's backward
        torch.cuda.current_stream(ticket.device).wait_event(ticket.ready)
        x.record_stream(torch.cuda.current_stream(ticket.device))
        ticket.fetched, ticket.below = None, None
        if self._newest is ticket:
            self._newest = None
        return x

    def _fetch(self, ticket: _Ticket) -> torch.Tensor:
        if ticket.fetched is None:
            assert self._streams is not None
            back = self._streams[1]
            with torch.cuda.stream(back):
                back.wait_event(ticket.ready)
                ticket.fetched = torch.empty(ticket.shape, dtype=ticket.dtype, device=ticket.device)
                ticket.fetched.copy_(ticket.place, non_blocking=True)
                ticket.ready = torch.cuda.Event()
                ticket.ready.record(back)
        return ticket.fetched


class _File:
    """One file of slots; a slot is free again when its :class:`_Slot` is collected with the graph that held it."""

    def __init__(self, folder: Path | None) -> None:
        made = [] if folder is None else [path for path in (folder, *folder.parents) if not path.exists()]
        # Folders that we made go when the store is closed or the process ends; other files in them stay.
        self._removal = weakref.finalize(self, _remove_empty, made)
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (it lives as long as the store)
        except OSError as error:
            raise OutputError(f"temporary_location {folder} cannot be written: {error}") from error
        self._folder = folder or Path(tempfile.gettempdir())
        self._end = self._written = self._used = 0
        self._free: dict[int, list[int]] = {}

    def write(self, x: torch.Tensor) -> _Slot:
        data = x.detach().contiguous().view(torch.uint8).numpy() if x.numel() else None
        size = 0 if data is None else -(-data.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        places = self._free.setdefault(size, [])
        if places:
            slot = _Slot(self, places.pop(), size)
        else:
            if self._end + size > self._written:
                require_space(self._folder, size, "offloading the inputs of decoder layers")
            slot = _Slot(self, self._end, size)
            self._end += size
            self._written = max(self._written, self._end)
        self._used += 1
        if data is not None:
            _write_all(self._file.fileno(), memoryview(data).cast("B"), slot.offset)
        return slot

    def read(self, slot: _Slot, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype)
        if x.numel():
            view, offset = memoryview(x.view(torch.uint8).numpy()).cast("B"), slot.offset
            while view:
                count = os.preadv(self._file.fileno(), [view], offset)
                view, offset = view[count:], offset + count
        return x

    def free(self, slot: _Slot) -> None:
        self._free.setdefault(slot.size, []).append(slot.offset)
        self._used -= 1
        if not self._used:
            # The next step may have other lengths: its slots start at the front again, or the file would grow with
            # every length that was ever seen.
            self._free.clear()
            self._end = 0

    def close(self) -> None:
        self._file.close()
        self._removal()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@dataclass(slots=True)
class _Slot:
    file: _File
    offset: int
    size: int

    def __del__(self) -> None:
        self.file.free(self)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
