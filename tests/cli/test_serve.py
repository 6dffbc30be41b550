"""``tunesmith serve`` as a process: it says what it serves, ends when it is told to, and says at once what is wrong."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.export.support import loaded
from tests.serving.processes import forked_server, server_process, stream, until_accepted


def test_a_run_is_served_and_sigterm_finishes_what_was_accepted(trained_run, tmp_path):
    words = trained_run, "--adapter", f"other={trained_run}", "--max-concurrent", 2
    with forked_server(tmp_path, *words) as (process, lines, port, out):
        assert lines[0] == f"serving at http://127.0.0.1:{port} (Ctrl-C ends)"
        assert lines[1].startswith("base: tiny-llama (") and lines[1].endswith(", window of 512 tokens)")
        assert lines[2] == "adapters: done, other"
        assert lines[3].startswith(f"curl http://127.0.0.1:{port}/v1/chat/completions ")
        asked = json.loads(lines[3].partition("-d '")[2].rstrip("'"))
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read())["model"] == "done"
        # The connection stays open and idle: it must not hold up the end.
        with ThreadPoolExecutor(6) as pool:
            # Two are being written, four wait for them.
            jobs = [
                pool.submit(stream, port, model, temperature=0, max_tokens=100)
                for model in ["done", "other", "tiny-llama"] * 2
            ]
            until_accepted(port, 7)
            os.kill(process.pid, signal.SIGTERM)
            answers = [job.result(60) for job in jobs]
        assert all(is_whole and text for text, is_whole in answers)
        assert answers[0] == answers[3] and answers[1] == answers[4] and answers[2] == answers[5]
        process.join(60)
        assert process.exitcode == 0
        assert out.read_text(encoding="utf-8").endswith("stopped; every request that was accepted has its answer\n")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "x"], "'x' is neither a folder"),
        (["--adapter", "a/b=DONE"], "'a/b' is no name for an adapter"),
        (["--adapter", "x=DONE", "--adapter", "x=DONE"], "the name 'x' is taken"),
        (["--adapter", "tiny-llama=DONE"], "the name 'tiny-llama' is taken"),
        (["--adapter", "x=MODEL"], "holds no adapter"),
        (["--adapter", "x=/no/where"], "no such file or folder"),
        (["--adapter", "x=PICKLE"], "adapter_model.bin, a pickle, which can run code"),
        (["--adapter-root", "/no/where"], "--adapter-root /no/where is no folder"),
        (["--api-key", " "], "--api-key is empty"),
        (["--kv-memory", "much"], "'much': write a number with a unit"),
        (["--max-body", "4"], "'4': write a number with a unit"),
        (["--port", "TAKEN"], "cannot listen at 127.0.0.1:"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1:8000"),
        (["--load-in-4bit", "--load-in-8bit"], "give one of them"),
    ],
)
def test_what_is_wrong_is_said_at_once(run, model_folder, trained_run, tmp_path, monkeypatch, words, message):
    def not_now(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be loaded for this")

    monkeypatch.setattr("tunesmith.cli.loading.load_source", not_now)
    pickle = tmp_path / "pickle"
    shutil.copytree(trained_run / "adapter", pickle)
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"DONE": trained_run, "MODEL": model_folder, "PICKLE": pickle, "TAKEN": taken.getsockname()[1]}
        for name, place in places.items():
            words = [word.replace(name, str(place)) for word in words]
        outcome = run("serve", model_folder, *words)
    assert outcome.code == 2, outcome
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_an_adapter_that_does_not_fit_ends_the_command(run, model_folder, trained_run, tmp_path):
    folder = tmp_path / "dora"
    shutil.copytree(trained_run / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}), encoding="utf-8")
    outcome = run("serve", model_folder, "--adapter", f"x={folder}", "--port", "0")
    assert outcome.code == 2 and "adapter x uses DoRA" in outcome.err


def test_a_missing_package_is_named_with_its_remedy(run, model_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )
    outcome = run("serve", model_folder)
    assert outcome.code == 2 and "uvicorn not installed: pip install -e '.[serve]' in the checkout" in outcome.err


@pytest.mark.slow
def test_a_base_in_four_bits_is_served_as_it_answers_offline(model_folder, trained_run):
    # In bfloat16 rounding would choose between the nearly equal tokens of a model that was not trained.
    model, tokenizer = loaded(trained_run, load_in_4bit=True, dtype="float32")
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    wanted = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    words = "--adapter", f"done={trained_run}", "--load-in-4bit", "--dtype", "float32"
    with server_process(model_folder, *words) as (_, lines, port):
        assert "4 bits" in lines[1]
        answer, is_whole = stream(port, "done", temperature=0, max_tokens=12)
    assert is_whole and answer == tokenizer.decode(wanted)


@pytest.mark.slow
def test_a_second_signal_cuts_answers_off_and_who_opens_the_server_to_all_is_told_so(model_folder):
    words = model_folder, "--served-name", "base", "--host", "0.0.0.0"
    with server_process(*words) as (process, lines, port):
        assert lines[1].startswith("base: base (") and lines[2] == "adapters: none"
        assert lines[3].startswith("note: everyone who reaches 0.0.0.0 can ask; --api-key")
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(stream, port, "base", begun.set, max_tokens=500, n=16)
            assert begun.wait(60)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            assert not job.result(60)[1]
        process.communicate(timeout=60)
        assert process.returncode == 130
