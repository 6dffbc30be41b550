"""How many tokens a second does the server write for 1, 4 and 16 clients, and what does it cost to change the adapter?

    python -m benchmarks.serving [--model smollm2-135m] [--dtype float32] [--clients 1 4 16] [--tokens 64] [--rounds 5]

A real server, asked over HTTP by as many threads as there are clients: each asks for ``--tokens`` tokens of an answer
to a short question, again and again, and end tokens are passed over, so that all answers are of one length. Once all
ask the base, once each in turn one of four adapters (rank 16 on every linear layer). Rounds go through all cases, so
that what disturbs the machine disturbs all alike; the record holds every round and its median.

Changing the adapter is measured three ways: the time until the engine has taken a request for an adapter that is in
memory and that the request before did not use; the time to the first token after a change and without one; and the time
to get an adapter that is not in memory from its folder. A run is one line of ``results/serving.jsonl``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.record import append_record

__all__ = ["measure"]

ADAPTERS = ("a", "b", "c", "d")
RANK = 16
QUESTION = "Write a few sentences about the sea, number {}."


def write_adapters(model: str, folder: Path) -> None:
    """Save four adapters by chance: what they say does not matter, what they cost does."""
    import torch

    from tunesmith import FastLanguageModel

    for seed, name in enumerate(ADAPTERS):
        torch.manual_seed(seed)
        base, _ = FastLanguageModel.from_pretrained(model)
        tuned = FastLanguageModel.get_peft_model(base, r=RANK, lora_alpha=RANK, random_state=seed)
        for key, weight in tuned.named_parameters():
            if ".lora_B." in key:
                weight.data = 0.002 * torch.randn_like(weight)
        tuned.save_pretrained(folder / name)


@contextmanager
def serving(engine: Any) -> Iterator[int]:
    """Serve ``engine`` in a thread and give the port."""
    from tunesmith.serving.address import bind
    from tunesmith.serving.server import Server, make_app

    bound, started = bind("127.0.0.1", 0), threading.Event()
    server = Server(make_app(engine, name="base"), started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    started.wait()
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def rate(port: int, clients: int, names: tuple[str, ...], tokens: int, requests: int) -> float:
    """Return tokens a second over ``requests`` of each of ``clients`` clients."""

    def ask(client: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        written = 0
        for number in range(requests):
            body = {
                "model": names[(client + number) % len(names)], "max_tokens": tokens, "ignore_eos": True,
                "seed": number, "messages": [{"role": "user", "content": QUESTION.format(clients * number + client)}],
            }  # fmt: skip
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            written += answer["usage"]["completion_tokens"]
        return written

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        written = sum(pool.map(ask, range(clients)))
    return written / (time.perf_counter() - start)


def swaps(engine: Any, folder: Path, times: int) -> dict[str, float]:
    """Return medians in milliseconds, see the head of this file."""
    from tunesmith.serving.adapters import AdapterShelf
    from tunesmith.serving.request import Request

    prompt = tuple(engine.tokenizer(QUESTION)["input_ids"])

    def first_token(name: str) -> tuple[float, float]:
        """Return the seconds until a request is taken, and until its first token."""
        done, begun = threading.Event(), threading.Event()

        def deliver(delta: Any) -> None:
            begun.set()
            if delta.finish is not None:
                done.set()

        start = time.perf_counter()
        engine.submit(Request(prompt, 2, name, ignore_end=True), deliver)
        taken = time.perf_counter()
        begun.wait()
        first = time.perf_counter()
        done.wait()
        return taken - start, first - start

    def median(measured: Callable[[int], float]) -> float:
        return 1000 * statistics.median(measured(number) for number in range(times))

    for name in ADAPTERS:
        first_token(name)
    same = median(lambda _: first_token("a")[1])
    taken = median(lambda number: first_token(ADAPTERS[number % 4])[0])
    other = median(lambda number: first_token(ADAPTERS[number % 4])[1])
    shelf = AdapterShelf(engine.model, engine.tokenizer, most=1)
    for name in ADAPTERS:
        shelf.add(name, folder / name)

    def read(number: int) -> float:
        start = time.perf_counter()
        shelf.get(ADAPTERS[number % 4])
        return time.perf_counter() - start

    return {
        "loaded_ms": taken, "first_token_same_ms": same, "first_token_other_ms": other, "unloaded_ms": median(read),
    }  # fmt: skip


def measure(
    model: str, dtype: str | None, clients: list[int], tokens: int, rounds: int, requests: int = 2, times: int = 40
) -> dict[str, Any]:
    """Return the record of one run."""
    from tunesmith.cli.loading import load_for_answers
    from tunesmith.models.load import facts_of
    from tunesmith.serving.engine import Engine, made_apart

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # Not in this thread: see made_apart.
        writer = threading.Thread(target=write_adapters, args=(model, folder))
        writer.start()
        writer.join()
        engine = made_apart(lambda: Engine(*load_for_answers(model, dtype=dtype, attach=False)))
        for name in ADAPTERS:
            engine.shelf.add(name, folder / name)
        cases = {"base": ("base",), "adapters": ADAPTERS}
        rates: dict[str, dict[str, list[float]]] = {case: {str(count): [] for count in clients} for case in cases}
        try:
            with serving(engine) as port:
                rate(port, max(clients), ("base", *ADAPTERS), tokens, 1)
                for _ in range(rounds):
                    for case, names in cases.items():
                        for count in clients:
                            rates[case][str(count)].append(rate(port, count, names, tokens, requests))
            swapped = swaps(engine, folder, times)
        finally:
            engine.close(drain=False)
    medians = {case: {count: statistics.median(values) for count, values in own.items()} for case, own in rates.items()}
    few, many = str(min(clients)), str(max(clients))
    return {
        "model": model, "dtype": facts_of(engine.model).dtype.name, "tokens": tokens, "rank": RANK, "rates": rates,
        "tokens_per_second": medians, "gain": {case: own[many] / own[few] for case, own in medians.items()},
        "swap": swapped,
    }  # fmt: skip


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round")
    args = parser.parse_args()
    record = measure(args.model, args.dtype, args.clients, args.tokens, args.rounds, args.requests)
    print(append_record("serving", record))


if __name__ == "__main__":
    main()
