"""The server with a real model: many clients and adapters, speed side by side, the same words as offline, SIGTERM."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.support import adapt, loaded
from tests.serving.clients import Served, ask_while_adapters_come_and_go, chat, serving
from tests.serving.markers import MARKERS, train_marker
from tests.serving.processes import server_process, stream, until_accepted

from tunesmith.cli.loading import load_for_answers
from tunesmith.models.prompts import require_prompt
from tunesmith.serving.engine import Engine

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m"
QUESTIONS = (
    "Name three colours.",
    "Write a sentence about the sea.",
    "What is a compiler?",
    "List the months of spring.",
    "Explain rain to a child in two sentences.",
    "Give me a recipe with eggs.",
)


@pytest.fixture(scope="module")
def root(smollm2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that say their markers, and two that changed by chance and say whatever they say."""
    folder = tmp_path_factory.mktemp("adapters")
    model, tokenizer = load_for_answers(MODEL, dtype="float32", attach=False)
    for name, marker in MARKERS.items():
        targets = ["q_proj", "v_proj", "down_proj"]
        train_marker(model, tokenizer, folder / name, marker, targets=targets, rate=5e-3, prompts=4)
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        tuned = adapt(smollm2()[0], r=8, lora_alpha=16)
        for key, weight in tuned.named_parameters():
            if "lora_B" in key:
                weight.data = 0.01 * torch.randn_like(weight)
        tuned.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    engine = Engine(*load_for_answers(MODEL, dtype="float32", attach=False), memory_bytes=2**31)
    for folder in root.iterdir():
        engine.shelf.add(folder.name, folder)
    with serving(engine, root) as here:
        yield here


def test_400_requests_of_32_clients_and_four_adapters(served):
    assert ask_while_adapters_come_and_go(served, requests=400, clients=32) >= 2


@pytest.mark.parametrize("name", ["base", "first", "second"])
def test_answers_at_temperature_0_are_those_of_offline_generation(served, root, name):
    """A difference is allowed where the two likeliest tokens are nearly equal: sums are made in another order there."""
    asked: dict[str, Any] = {"model": name, "temperature": 0, "max_tokens": 48, "logprobs": True}
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        whole = list(
            pool.map(
                lambda text: served.client.chat.completions.create(
                    messages=[{"role": "user", "content": text}], **asked
                ),
                QUESTIONS,
            )
        )
    model, tokenizer = loaded(MODEL if name == "base" else root / name)
    model.eval()
    differing = 0
    for text, answer in zip(QUESTIONS, whole, strict=True):
        prompt = require_prompt(tokenizer, [{"role": "user", "content": text}])
        offline = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=48,
        )[0, len(prompt) :].tolist()  # fmt: skip
        said = [token.token for token in answer.choices[0].logprobs.content]
        words = [tokenizer.decode([token]) for token in offline if token not in tokenizer.all_special_ids]
        at = next((at for at, pair in enumerate(zip(said, words, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            assert len(said) == len(words)
            continue
        differing += 1
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + offline[:at]])).logits[0, -1]
        best = logits.topk(2).values
        assert best[0] - best[1] < 1e-3, f"{text!r} differs at token {at}"
    assert differing < len(QUESTIONS) / 2


def test_16_clients_get_at_least_four_times_the_tokens_of_one(served):
    names = ["base", "first", "second", "red"]

    def ask(number: int) -> int:
        answer = served.client.chat.completions.create(
            model=names[number % 4], messages=chat(number), max_tokens=48, extra_body={"ignore_eos": True}
        )
        return answer.usage.completion_tokens

    def rate(clients: int, requests: int) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            tokens = sum(pool.map(ask, range(requests)))
        return tokens / (time.perf_counter() - start)

    rate(16, 16)
    alone, together = zip(*((rate(1, 4), rate(16, 32)) for _ in range(3)), strict=True)
    ratio = statistics.median(together) / statistics.median(alone)
    print(f"one client {statistics.median(alone):.1f} tokens/s, 16 {statistics.median(together):.1f}: {ratio:.1f}x")
    assert ratio >= 4


def test_sigterm_under_load_loses_no_accepted_request(root):
    adapters = [word for name in ("first", "second") for word in ("--adapter", f"{name}={root / name}")]
    words = MODEL, *adapters, "--dtype", "float32", "--max-concurrent", 8
    with server_process(*words) as (process, _, port), ThreadPoolExecutor(16) as pool:
        names = [MODEL, "first", "second", "first"] * 4
        jobs = [pool.submit(stream, port, name, max_tokens=40, seed=1) for name in names]
        until_accepted(port, 16)
        process.send_signal(signal.SIGTERM)
        answers = [job.result(300) for job in jobs]
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert all(is_whole and text for text, is_whole in answers)
