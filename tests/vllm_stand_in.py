"""Stands for vLLM's server where tests are about the process and what it is asked, not about what it computes.

``VLLM_STAND_IN`` is a folder of the test's: ``answers.json`` says what the log-probabilities of prompts are, by name of
the adapter's folder or "base", and which fault to show; ``start.json`` and ``asked.jsonl`` are what it was told. Its
answers name the adapter with a sum of the bytes that were loaded as it. Only the standard library: it starts at once.
"""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import sys
import time
import zlib
from pathlib import Path
from typing import Any

PLACE = Path(os.environ.get("VLLM_STAND_IN", "."))
LOADED: dict[str, str] = {}


def make_command(folder: Path) -> Path:
    """Write the command ``vllm`` and the Python beside it, which runs this file whatever module is asked for."""
    folder.mkdir()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{__file__}" "$@"\n', encoding="utf-8")
    (folder / "vllm").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    for file in (python, folder / "vllm"):
        file.chmod(0o755)
    return folder


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with (PLACE / "asked.jsonl").open("a") as file:
            file.write(json.dumps({"path": self.path, **body}) + "\n")
        answers = json.loads((PLACE / "answers.json").read_text())
        if self.path == "/v1/load_lora_adapter" and answers.get("fault") == "no adapters":
            self.answer({"error": {"message": "expected target modules in ['q_proj']"}}, 500)
            return
        if self.path == "/v1/load_lora_adapter":
            weights = (Path(body["lora_path"]) / "adapter_model.safetensors").read_bytes()
            LOADED[body["lora_name"]] = f"{zlib.crc32(weights):x}"
        elif self.path == "/v1/unload_lora_adapter":
            del LOADED[body["lora_name"]]
        elif (known := compared(body, answers)) is not None:
            self.answer(known)
            return
        else:
            self.generate(body, answers.get("fault"))
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"Success")

    def generate(self, body: dict[str, Any], fault: str | None) -> None:
        if fault == "dies":
            print("RuntimeError: no memory is left", flush=True)
            os._exit(3)
        if fault == "sleeps":
            time.sleep(60)
        if fault == "refuses":
            self.answer({"error": {"message": "top_p must be in (0, 1]", "code": 400}}, 400)
            return
        if fault == "fails":
            self.answer({"error": {"message": "EngineDeadError"}}, 500)
            return
        text = body["model"] + (f" {LOADED[body['model']]}" if body["model"] in LOADED else "")
        choices = [{"index": index, "text": text, "token_ids": [5, 6], "finish_reason": "stop", "stop_reason": 6,
                    "logprobs": places(body["logprobs"]) if "logprobs" in body else None}
                   for index in reversed(range(body["n"]))]  # fmt: skip
        self.answer({"choices": choices})

    def answer(self, body: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        pass


def places(count: int) -> dict[str, Any]:
    """Two tokens: the first is the likeliest, the second is not among ``count``."""
    top = {f"token_id:{5 - rank}": -0.5 - rank for rank in range(count)}
    return {"tokens": ["token_id:5", "token_id:6"], "token_logprobs": [-0.5, -9.0],
            "top_logprobs": [top, {**top, "token_id:6": -9.0}]}  # fmt: skip


def compared(body: dict[str, Any], answers: dict[str, Any]) -> dict[str, Any] | None:
    """Return the answer to a probe, None for other prompts: that of the test, of adapters without any other words."""
    name, key = body["model"].rpartition("-")[0] or body["model"], ",".join(map(str, body["prompt"]))
    if key not in answers["base"]:
        return None
    known = answers[name][key] if name in answers else {**answers["base"][key], "token_ids": [1] * 8}
    return {"choices": [{"index": 0, "text": "", "finish_reason": "length", **known}]}


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


if __name__ == "__main__":
    words = sys.argv[1:]
    (PLACE / "start.json").write_text(json.dumps({"words": words, "environment": dict(os.environ), "pid": os.getpid()}))
    if json.loads((PLACE / "answers.json").read_text()).get("fault") == "starts not":
        print("INFO it begins\nValueError: Model architectures ['LlamaForCausalLM'] are not supported for now.")
        sys.exit(1)
    Server(words[words.index("--uds") + 1], Answers).serve_forever()
