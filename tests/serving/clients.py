"""A real server in a thread of this process, and clients that ask it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from tests.export.support import loaded
from tests.serving.markers import MARKERS, prompt_of

from tunesmith.serving.address import bind
from tunesmith.serving.engine import Engine
from tunesmith.serving.server import Server, make_app

JSON = {"Content-Type": "application/json"}


@dataclass
class Served:
    engine: Engine
    server: Server
    port: int
    root: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] = JSON) -> tuple[int, Any, Any]:
        """Return status, headers and body of one bare request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, response.headers, json.loads(text) if is_json else text

    def post(self, path: str, **body: Any) -> tuple[int, Any, Any]:
        return self.ask("POST", path, body)


@contextmanager
def serving(base: Path | Engine, root: Path, *, most_sequences: int = 32, **settings: Any) -> Iterator[Served]:
    """Serve a base, which is closed at the end; adapters may be loaded from ``root``."""
    engine = base if isinstance(base, Engine) else Engine(*loaded(base), most_sequences=most_sequences)
    bound = bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    started = threading.Event()
    server = Server(make_app(engine, name="base", **{"adapter_roots": [root], **settings}), started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert started.wait(20)
        yield Served(engine, server, port, root)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        engine.close(drain=False)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def chat(number: int = 0) -> list[Any]:
    return [{"role": "user", "content": prompt_of(number)}]


def ask_while_adapters_come_and_go(served: Served, *, requests: int, clients: int) -> int:
    """Ask the adapters of all markers from many threads, and check every answer; return how often others changed."""
    client, names = served.client, list(MARKERS)
    is_over = threading.Event()

    def ask(number: int) -> str:
        name = names[number % 4]
        asked: dict[str, Any] = {"model": name, "messages": chat(number), "temperature": 0, "max_tokens": 12}
        if number % 3:
            return client.chat.completions.create(**asked).choices[0].message.content
        parts = client.chat.completions.create(**asked, stream=True)
        return "".join(part.choices[0].delta.content or "" for part in parts)

    def swap() -> int:
        swaps = 0
        while not is_over.is_set():
            name = names[swaps % 4]
            for served_as in ("guest", name):
                body = {"lora_name": served_as, "lora_path": name, "load_inplace": served_as == name}
                assert served.post("/v1/load_lora_adapter", **body)[0] == 200
            said = client.chat.completions.create(model="guest", messages=chat(), temperature=0)
            assert said.choices[0].message.content == MARKERS[name]
            assert served.post("/v1/unload_lora_adapter", lora_name="guest")[0] == 200
            swaps += 1
        return swaps

    with ThreadPoolExecutor(clients + 1) as pool:
        swapping = pool.submit(swap)
        try:
            answers = list(pool.map(ask, range(requests)))
        finally:
            is_over.set()
        swaps = swapping.result()
    wrong = [(number, text) for number, text in enumerate(answers) if text != MARKERS[names[number % 4]]]
    assert not wrong
    return swaps
