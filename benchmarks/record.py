"""One JSON line a run: what was measured, on what machine, with which versions and commit."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from tunesmith.core.versions import stack_versions

__all__ = ["RESULTS", "append_record", "environment"]

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Return date, commit, processor, threads and versions of this run."""
    import torch

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": stack_versions(),
    }


def append_record(name: str, record: dict[str, Any]) -> str:
    """Append ``record`` with its environment to ``results/<name>.jsonl`` and return the line."""
    line = json.dumps({**environment(), **record})
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    return line


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
