"""``tunesmith serve`` as a process, and clients that only need its port."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests import forking

from tunesmith.cli.main import main


@contextmanager
def server_process(*words: Any) -> Iterator[tuple[subprocess.Popen[str], list[str], int]]:
    """Start a server at a free port; give the process, the lines that it printed, and the port."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    call = [sys.executable, "-m", "tunesmith.cli.main", "serve", *map(str, words), "--port", "0"]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("curl "):
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            lines.append(line.rstrip())
        yield process, lines, int(lines[0].split()[2].rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


@contextmanager
def forked_server(folder: Path, *words: Any) -> Iterator[tuple[BaseProcess, list[str], int, Path]]:
    """Start one that need not import torch first, which writes to files in ``folder``; give the file of stdout too."""
    out, err = folder / "out", folder / "err"
    process = forking.start(main, ["serve", *map(str, words), "--port", "0"], out=out, err=err)
    try:
        lines: list[str] = []
        deadline = time.monotonic() + 60
        while not lines or not lines[-1].startswith("curl "):
            assert process.is_alive() and time.monotonic() < deadline, err.read_text(encoding="utf-8")
            time.sleep(0.02)
            lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        yield process, lines, int(lines[0].split()[2].rpartition(":")[2]), out
    finally:
        process.kill()
        process.join()


def stream(port: int, model: str, begun: Callable[[], Any] = int, **body: Any) -> tuple[str, bool]:
    """Return the text of a streamed answer and whether it came to its end."""
    asked = {"model": model, "prompt": "the cat", "max_tokens": 200, "ignore_eos": True, "stream": True, **body}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
    connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    text, is_whole = "", False
    try:
        while line := response.readline():
            if line.startswith(b"data: {"):
                begun()
                text += json.loads(line[6:])["choices"][0]["text"]
            is_whole |= line == b"data: [DONE]\n"
    except (http.client.IncompleteRead, ConnectionError):
        is_whole = False
    return text, is_whole


def until_accepted(port: int, count: int) -> None:
    """Wait until so many answers are written, wait or have ended."""
    names = ("tunesmith_answers_running", "tunesmith_answers_waiting", "tunesmith_answers_total")
    accepted = 0
    while accepted < count:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        accepted = sum(int(line.split()[1]) for line in lines if line.startswith(names))
