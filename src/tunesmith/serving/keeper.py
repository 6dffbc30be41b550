"""Run a command for as long as its starter lives: ``python -I keeper.py FOLDER COMMAND ...``.

The starter holds the other end of this process's standard input, which the system closes when the starter ends in any
way, also by a kill that leaves it no time for a last word. Then the command ends with all that it has started, and
``FOLDER``, which holds what it needed, is removed; the word "keep" before that leaves the folder. Imports nothing of
this library, which the command's environment need not have.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

__all__ = ["keep"]

_GRACE_S = 5


def keep(folder: Path, command: list[str]) -> None:
    """Run ``command`` and end this process with it, or it with the starter."""
    # A session of its own: Ctrl-C on a terminal is for the starter, and what the command starts is found again.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    is_ending = threading.Event()

    def follow() -> None:
        code = child.wait()
        if not is_ending.is_set():
            _signal(child, signal.SIGKILL)  # what it has started and left
            os._exit(code if code > 0 else 1)

    threading.Thread(target=follow, daemon=True).start()
    word = sys.stdin.read()
    is_ending.set()
    _signal(child, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE_S)
    _signal(child, signal.SIGKILL)
    child.wait()
    if not word.startswith("keep"):
        shutil.rmtree(folder, ignore_errors=True)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # nothing of it is left; macOS says the latter of zombies
        os.killpg(child.pid, number)


if __name__ == "__main__":
    keep(Path(sys.argv[1]), sys.argv[2:])
