"""A model hub on this machine: what huggingface_hub asks for when a folder is uploaded, and a memory of what came."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "x" * 20


_PULL_REQUEST = {"num": 1, "title": "", "createdAt": "2026-01-01T00:00:00.000Z", "status": "draft", "events": [],
                 "isPullRequest": True, "changes": {"base": "refs/heads/main"}, "filesWithConflicts": []}  # fmt: skip


class FakeHub:
    """Repositories by name, and what was asked of each.

    Attributes:
        address: for ``constants.ENDPOINT``.
        made: name -> what ``create_repo`` sent.
        files: name -> path -> content of the last commit.
        commits: name -> the head of that commit and the query it came with.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.made: dict[str, Any] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, Any] = {}

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON that answer a request."""
        path, _, query = path.partition("?")
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "ada", "orgs": [{"name": "engines"}]}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'ada'}/{asked['name']}"
            self.made[name] = asked
            return 200, {"url": f"{self.address}/{name}", "id": name}
        name = "/".join(parts[2:4])
        if parts[4] == "branch":
            return 200, {}
        if parts[4] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": files}
        if parts[4] == "discussions":
            return 200, _PULL_REQUEST | {"repo": {"name": name, "type": "model"}}
        lines = [json.loads(line) for line in body.decode().splitlines() if line]
        self.commits[name] = {**lines[0]["value"], "branch": parts[5], "query": query}
        self.files[name] = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                            for line in lines if line["key"] == "file"}  # fmt: skip
        url = f"{self.address}/{name}"
        return 200, {"commitUrl": f"{url}/commit/1", "commitOid": "1" * 40,
                     "pullRequestUrl": f"{url}/discussions/1" if "create_pr" in query else None}  # fmt: skip


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run a hub on a free port for the block; it takes :data:`TOKEN` and no other."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, said = hub.answer(self.path, body) if allowed else (401, {"error": "Invalid username or password."})
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
