"""The memory that a process has used."""

from __future__ import annotations

import resource
import sys

__all__ = ["peak_bytes"]


def peak_bytes() -> int:
    """Return the peak bytes on the GPU if one is in use, else the peak resident set of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
