"""``fast_inference=True`` with a stand-in for vLLM: a real process, asked over its socket; see vllm_stand_in.py."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.export.support import adapt, disturb
from tests.tiny import save_model
from tests.vllm_support import StandIn, scores_of, stand_in_for

import tunesmith
from tunesmith import FastLanguageModel, SamplingParams
from tunesmith.core.errors import AdapterError, ModelError, NotSupportedYetError, ServingError, SettingsError
from tunesmith.models.load import facts_of
from tunesmith.serving import keeper, vllm


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fast") / "base"
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def live(base: Path) -> tuple[Any, Any]:
    """The same model without vLLM, not to be changed."""
    return FastLanguageModel.from_pretrained(str(base), dtype="float32")


@pytest.fixture(scope="module")
def scores(live: tuple[Any, Any]) -> dict[str, Any]:
    return scores_of(*live)


@pytest.fixture
def stand_in(tmp_path: Path, scores: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return stand_in_for(scores, tmp_path, monkeypatch)


@pytest.fixture
def load(base: Path, stand_in: StandIn) -> Iterator[Callable[..., Any]]:
    """``load(**arguments)``: the model with its vLLM, which ends with the test."""
    models: list[Any] = []

    def begin(**arguments: Any) -> Any:
        how = {"dtype": "float32", "fast_inference": True, **arguments}
        models.append(FastLanguageModel.from_pretrained(str(base), **how)[0])
        return models[-1]

    yield begin
    for model in models:
        facts_of(model).fast.vllm.close()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_vllm_is_told_what_the_live_model_is(load, stand_in, base, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/packages/of/this/environment")
    model = load(max_seq_length=256, max_lora_rank=40, float8_kv_cache=True)
    words, environment = stand_in.started["words"], stand_in.started["environment"]
    assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    told = {name: words[words.index(name) + 1] for name in words if name.startswith("--") and name != "--enable-lora"}
    place = facts_of(model).fast.vllm.place
    assert told == {
        "--model": str(base), "--served-model-name": "base", "--tokenizer": str(place / "tokenizer"),
        "--uds": str(place / "socket"), "--dtype": "float32", "--max-model-len": "256", "--generation-config": "vllm",
        "--max-lora-rank": "64", "--kv-cache-dtype": "fp8",
    }  # fmt: skip
    assert (place / "tokenizer" / "tokenizer.json").is_file()
    assert place.stat().st_mode & 0o077 == 0, "others can reach the socket"
    wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    assert wanted.items() <= environment.items()
    assert "PYTHONPATH" not in environment and "VLLM_NO_USAGE_STATS" not in os.environ


def test_prompts_of_every_form_are_answered_in_their_order(load, stand_in, live):
    model, tokenizer = load(), live[1]
    ids = tokenizer("the cat")["input_ids"]
    one = model.fast_generate("the cat", use_tqdm=False)
    assert [(entry.prompt, entry.prompt_token_ids, entry.finished) for entry in one] == [("the cat", ids, True)]
    answer = one[0].outputs[0]
    assert (answer.text, answer.token_ids, answer.finish_reason, answer.stop_reason) == ("base", [5, 6], "stop", 6)
    assert answer.cumulative_logprob is None and answer.logprobs is None and answer.finished()
    mixed = ["the cat", {"prompt": "a dog"}, {"prompt_token_ids": [7, 8]}, [9, 10]]
    found = model.fast_generate(mixed, SamplingParams(n=2), use_tqdm=False)
    assert [entry.prompt for entry in found] == ["the cat", "a dog", None, None]
    assert [entry.prompt_token_ids for entry in found] == [ids, tokenizer("a dog")["input_ids"], [7, 8], [9, 10]]
    assert [[output.index for output in entry.outputs] for entry in found] == [[0, 1]] * 4
    assert [entry.request_id for entry in found] == ["0", "1", "2", "3"]
    assert model.fast_generate([9, 10], use_tqdm=False)[0].prompt_token_ids == [9, 10]
    assert model.fast_generate([], use_tqdm=False) == []


SETTINGS: dict[str, Any] = {
    "n": 2, "temperature": 0.3, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 9, "min_tokens": 2,
    "stop": ["x"], "seed": 7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25,
    "logprobs": 1, "ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False,
    "stop_token_ids": [9],
}  # fmt: skip


def test_every_setting_of_an_answer_is_passed_on(load, stand_in):
    model = load()
    model.fast_generate([5, 6], SamplingParams(**SETTINGS), use_tqdm=False)
    assert set(SETTINGS) == set(SamplingParams.__dataclass_fields__)
    assert {name: stand_in.asked()[-1][name] for name in SETTINGS} == SETTINGS
    # vLLM's own object, of which only the attributes are seen.
    plain = {**dict.fromkeys(SETTINGS), "logit_bias": None, "_private": 1, "output_text_buffer_length": 0}

    class TheirParams(SimpleNamespace):
        def __init__(self, **given: Any) -> None:
            super().__init__(**{**plain, **given})

    model.fast_generate([5, 6], TheirParams(**SETTINGS, output_text_buffer_length=3, _private=2), use_tqdm=False)
    assert {name: stand_in.asked()[-1][name] for name in SETTINGS} == SETTINGS
    with pytest.raises(SettingsError, match=r"sampling_params.logit_bias=\{5: 1.0\} is not passed on to vLLM"):
        model.fast_generate([5, 6], TheirParams(**SETTINGS, logit_bias={5: 1.0}))
    with pytest.raises(SettingsError, match="sampling_params is a dict"):
        model.fast_generate([5, 6], {"temperature": 0})


def test_an_answer_ends_with_the_window_and_at_the_end_tokens_of_the_model(load, stand_in, live):
    model, tokenizer = load(max_seq_length=72), live[1]
    facts_of(model).tokenizer = tokenizer
    model.generation_config.eos_token_id = [11, tokenizer.eos_token_id]
    for asked, given in ((None, 62), (100, 62), (20, 20)):
        model.fast_generate(list(range(20, 30)), SamplingParams(max_tokens=asked, stop_token_ids=[12]), use_tqdm=False)
        body = stand_in.asked()[-1]
        assert (body["max_tokens"], body["stop_token_ids"]) == (given, [11, 12])
    model.fast_generate([5], SamplingParams(ignore_eos=True), use_tqdm=False)
    assert "stop_token_ids" not in stand_in.asked()[-1]
    with pytest.raises(SettingsError, match="prompt 2 has 72 tokens, and the window of 72"):
        model.fast_generate([[5], [5] * 72])


def test_a_bos_that_the_text_has_is_not_written_twice(load, stand_in):
    model = load()
    tokenizer = facts_of(model).tokenizer
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.backend_tokenizer.post_processor = __import__("tokenizers").processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    begin = tokenizer.bos_token_id
    with_one, without = model.fast_generate(["<|im_start|>the cat", "the cat"], use_tqdm=False)
    assert with_one.prompt_token_ids == without.prompt_token_ids
    assert without.prompt_token_ids.count(begin) == 1 and without.prompt_token_ids[0] == begin


def test_log_probabilities_have_the_form_of_vllm(load):
    answer = load().fast_generate([5, 6], SamplingParams(logprobs=1), use_tqdm=False)[0].outputs[0]
    assert answer.cumulative_logprob == -9.5
    assert [{token: (entry.logprob, entry.rank) for token, entry in place.items()} for place in answer.logprobs] == [
        {5: (-0.5, 1)},
        {5: (-0.5, 1), 6: (-9.0, None)},
    ]
    assert all(isinstance(entry.decoded_token, str) for place in answer.logprobs for entry in place.values())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"inputs": None}, "fast_generate got a NoneType. Give a text"),
    ({"inputs": torch.tensor([[5]])}, "fast_generate got a Tensor"),
    ({"inputs": [5], "max_new_tokens": 4}, r"fast_generate\(max_new_tokens=...\): vLLM answers"),
    ({"inputs": [{"role": "user", "content": "x"}]}, "prompt 1 has the keys role, content.*apply_chat_template"),
    ({"inputs": {"prompt": "x", "multi_modal_data": {}}}, "prompt 1 has the keys prompt, multi_modal_data"),
    ({"inputs": [[5], [5.5]]}, r"prompt 2 is \[5.5\]"),
    ({"inputs": ["a", ""]}, "prompt 2 is empty"),
    ({"inputs": [5], "lora_request": "folder"}, "lora_request is a str. Give what model.load_lora"),
]


def test_what_cannot_be_asked_is_refused(load):
    model = load()
    for call, message in REFUSED:
        with pytest.raises(SettingsError, match=message):
            model.fast_generate(**call)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("refuses", SettingsError, r"vLLM refuses this: top_p must be in \(0, 1\]"),
        ("fails", ServingError, "vLLM failed: EngineDeadError"),
        ("dies", ServingError, "(?s)does not answer any more.*RuntimeError: no memory is left.*The whole log: "),
    ],
)
def test_a_failure_of_vllm_is_told_with_its_log(load, stand_in, fault, error, message):
    model = load()
    stand_in.say(fault=fault)
    with pytest.raises(error, match=message):
        model.fast_generate([[5]] * 3, use_tqdm=False)
    vllm_process = facts_of(model).fast.vllm
    vllm_process.close()
    assert vllm_process.log.exists() == (error is ServingError), "a log that was named must stay"
    shutil.rmtree(vllm_process.place, ignore_errors=True)


def test_an_interruption_does_not_wait_for_what_is_being_answered(load, stand_in):
    model = load()
    stand_in.say(fault="sleeps")
    # A test run that a shell began in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            model.fast_generate([[5]] * 3, use_tqdm=False)
        assert time.monotonic() - began < 10
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_model_that_vllm_lacks_is_named_with_what_to_do(load, stand_in):
    stand_in.say(fault="starts not")
    with pytest.raises(ModelError) as raised:
        load()
    said = str(raised.value)
    assert "vLLM ended before it answered for LlamaForCausalLM. Give fast_inference=False" in said
    assert "Model architectures ['LlamaForCausalLM'] are not supported" in said
    log = Path(said.rpartition("The whole log: ")[2])
    assert log.is_file()
    shutil.rmtree(log.parent)


def test_another_model_than_the_live_one_is_refused_and_ends(load, stand_in, live):
    stand_in.say(base=scores_of(*live, less=0.002))
    with pytest.raises(
        ModelError, match=r"vLLM answers otherwise than .*: log-probabilities differ by 0\.002 nats, where 0\.001"
    ):
        load()
    assert is_gone(stand_in.started["pid"])


def test_a_copy_of_the_model_asks_the_same_vllm(load):
    model = load()
    assert facts_of(copy.deepcopy(model)).fast.vllm is facts_of(model).fast.vllm


def test_vllm_reads_the_revision_of_a_hub_model_that_was_loaded(stand_in, base, tmp_path):
    commit, place = "0123456789" * 4, tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(base, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "other").write_text(commit)
    how = {"dtype": "float32", "revision": "other", "cache_dir": str(tmp_path / "hub"), "fast_inference": True}
    model, _ = FastLanguageModel.from_pretrained("someone/tiny", **how)
    words = stand_in.started["words"]
    assert words[words.index("--model") + 1] == str(place / "snapshots" / commit)
    facts_of(model).fast.vllm.close()


def test_vllm_ends_with_the_model_and_leaves_nothing(base, stand_in):
    model = FastLanguageModel.from_pretrained(str(base), dtype="float32", fast_inference=True)[0]
    place = facts_of(model).fast.vllm.place
    assert place.is_dir()
    del model
    gc.collect()
    assert is_gone(stand_in.started["pid"]) and not place.exists()


def test_vllm_ends_when_its_starter_is_killed(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    script = f"""
import subprocess, sys, time
command = ["sh", "-c", "sleep 100 & echo $! $$; wait"]
subprocess.Popen([sys.executable, "-I", {keeper.__file__!r}, {str(place)!r}, *command], stdin=subprocess.PIPE)
time.sleep(100)
"""
    starter = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pids = [int(word) for word in starter.stdout.readline().split()]
    assert not any(map(is_gone, pids))
    starter.kill()
    starter.wait()
    until(lambda: all(map(is_gone, pids)) and not place.exists())
    starter.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"full_finetuning": True}, SettingsError, "fast_inference=True and full_finetuning=True: vLLM has weights of"),
        ({"load_in_8bit": True}, SettingsError, "load_in_8bit=True: vLLM does not compute in"),
        ({"trust_remote_code": True}, SettingsError, "trust_remote_code=True: vLLM would run its own"),
        ({"resize_model_vocab": 400}, SettingsError, "resize_model_vocab=400: vLLM reads the vocabulary"),
        ({"rope_scaling": "yarn", "max_seq_length": 1024}, SettingsError, "rope_scaling='yarn': vLLM reads the window"),
        ({"auto_model": object}, SettingsError, "vLLM chooses the class"),
        ({"load_in_4bit": True}, ModelError, "is loaded in 4 bits, which vLLM computes on GPUs alone"),
        ({"max_seq_length": 1024}, ModelError, "has a stretched window, which vLLM would not stretch alike"),
        ({"task_type": "SEQ_CLS", "num_labels": 2}, ModelError, "is a model for SEQ_CLS, and vLLM writes text"),
        ({"max_lora_rank": 513}, SettingsError, "max_lora_rank=513: vLLM takes adapters up to rank 512"),
        ({"gpu_memory_utilization": 0.9}, SettingsError, "gpu_memory_utilization=0.9 is for a GPU"),
    ],
)
def test_what_vllm_would_do_otherwise_is_refused(load, stand_in, arguments, error, message):
    if torch.cuda.is_available() and {"load_in_4bit", "gpu_memory_utilization"} & set(arguments):
        pytest.skip("a GPU is here")
    with pytest.raises(error, match=message):
        load(**arguments)
    assert not (stand_in.place / "start.json").exists(), "it was started all the same"


def test_the_own_package_comes_before_the_command_and_neither_is_said(monkeypatch, stand_in):
    python, is_other = vllm.vllm_python()
    assert (Path(python).parent, is_other) == (stand_in.place.parent / "bin", True)
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    assert vllm.vllm_python() == (sys.executable, False)
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match=r"package vllm, which is installed neither here.*fast_inference=False"):
        vllm.vllm_python()


def saved(model: Any, folder: Path, **arguments: Any) -> Path:
    """Save an adapter that has moved."""
    disturb(adapt(model, **arguments)).save_pretrained(folder)
    return folder


@pytest.fixture
def fresh(base: Path) -> Callable[[], Any]:
    return lambda: FastLanguageModel.from_pretrained(str(base), dtype="float32")[0]


def test_an_adapter_is_asked_for_by_its_folder_and_the_base_without(load, stand_in, fresh, tmp_path):
    folder = saved(fresh(), tmp_path / "one", r=4)
    model = load()
    request = model.load_lora(str(folder))
    assert (request.lora_name, request.lora_int_id, request.lora_path) == ("one", 1, str(folder))
    assert model.load_lora(str(folder)) is request
    first = model.fast_generate("the cat", lora_request=request, use_tqdm=False)[0]
    assert first.outputs[0].text.startswith("one-1 ")
    assert first.lora_request is request is first.outputs[0].lora_request
    assert model.fast_generate("the cat", use_tqdm=False)[0].outputs[0].text == "base"
    assert len(stand_in.asked("/v1/load_lora_adapter")) == 1
    # vLLM's own request, of which only the path is seen.
    theirs = SimpleNamespace(lora_name="mine", lora_int_id=9, lora_path=str(folder))
    assert model.fast_generate("the cat", lora_request=theirs, use_tqdm=False)[0].outputs[0].text.startswith("one-1 ")


def test_load_tensors_says_when_an_adapter_is_read(load, stand_in, fresh, tmp_path):
    folder, model = saved(fresh(), tmp_path / "one"), load()
    request = model.load_lora(str(folder), load_tensors=False)
    assert stand_in.asked("/v1/load_lora_adapter") == []
    model.fast_generate([5], lora_request=request, use_tqdm=False)
    assert len(stand_in.asked("/v1/load_lora_adapter")) == 1


def test_an_adapter_that_was_saved_anew_is_never_answered_with_as_it_was(load, stand_in, fresh, tmp_path):
    folder, model = saved(fresh(), tmp_path / "one"), load()
    request = model.load_lora(str(folder))
    before = model.fast_generate([5], lora_request=request, use_tqdm=False)[0].outputs[0].text
    torch.manual_seed(1)
    saved(fresh(), folder)
    after = model.fast_generate([5], lora_request=request, use_tqdm=False)[0].outputs[0].text
    assert before.split()[0] == "one-1" and after.split()[0] == "one-2"
    assert before.split()[1] != after.split()[1], "the weights are the old ones"
    assert [body["lora_name"] for body in stand_in.asked("/v1/unload_lora_adapter")] == ["one-1"]


def test_vllm_gets_the_matrices_with_their_scale_in_b(load, fresh, tmp_path):
    from safetensors.torch import load_file

    how = {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 6}}
    folder, model = saved(fresh(), tmp_path / "one", r=4, lora_alpha=16, **how), load()
    model.load_lora(str(folder))
    place = facts_of(model).fast.vllm.place / "one-1"
    config = json.loads((place / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 4, {}, {})
    theirs, ours = load_file(place / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    assert set(theirs) == set(ours)
    for name, value in ours.items():
        scale = 1 if "lora_A" in name else 3 if "up_proj" in name else 4
        assert torch.equal(theirs[name], value * scale), name


def test_the_trained_model_saves_and_asks_for_its_adapter(load, stand_in, live, tmp_path):
    model = disturb(adapt(load(), r=4, lora_alpha=8))
    model.save_lora(str(tmp_path / "one"))
    stand_in.say(one=scores_of(model, live[1]))
    model.train()
    request = model.load_lora(str(tmp_path / "one"))
    assert model.fast_generate([5], lora_request=request, use_tqdm=False)[0].outputs[0].text.startswith("one-1")
    assert model.training, "it was left in evaluation mode"
    disturb(model)
    model.save_lora(str(tmp_path / "one"))
    with pytest.raises(AdapterError, match="otherwise than the model here: log-probabilities differ by"):
        model.fast_generate([5], lora_request=request)
    assert [body["lora_name"] for body in stand_in.asked("/v1/unload_lora_adapter")] == ["one-2"]


def test_an_adapter_folder_brings_its_base_and_answers_as_the_live_model(stand_in, fresh, tmp_path):
    folder = saved(fresh(), tmp_path / "one")
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), dtype="float32", fast_inference=True)
    stand_in.say(one=scores_of(model, tokenizer))
    request = model.load_lora(str(folder))
    assert model.fast_generate([5], lora_request=request, use_tqdm=False)[0].outputs[0].text.startswith("one-1")
    facts_of(model).fast.vllm.close()


def test_an_adapter_that_vllm_does_nothing_with_is_an_error(load, stand_in, fresh, scores, tmp_path):
    stand_in.say(one=scores, zero=scores)
    folder, model = saved(fresh(), tmp_path / "one"), load()
    with pytest.raises(AdapterError, match=r"vLLM answers with adapter .* as without it, though its weights are not"):
        model.load_lora(str(folder))
    untrained = adapt(fresh(), init_lora_weights=True)
    untrained.save_pretrained(tmp_path / "zero")
    assert model.load_lora(str(tmp_path / "zero")).lora_name == "zero"


def test_an_adapter_that_vllm_cannot_serve_is_refused(load, fresh, tmp_path):
    model = load(max_lora_rank=8)
    for name, arguments, message in (
        ("dora", {"use_dora": True}, "uses DoRA, which cannot lie beside"),
        ("whole", {"modules_to_save": ["lm_head"]}, "uses modules that train whole"),
        (
            "wide",
            {"r": 12},
            "has rank 12, and vLLM was started for ranks up to 8. Load the model with max_lora_rank=12",
        ),
    ):
        folder = saved(fresh(), tmp_path / name, **arguments)
        with pytest.raises(AdapterError, match=message):
            model.load_lora(str(folder))


def test_an_adapter_that_vllm_does_not_take_is_refused_in_its_words(load, stand_in, fresh, tmp_path):
    folder, model = saved(fresh(), tmp_path / "one"), load()
    stand_in.say(fault="no adapters")
    with pytest.raises(AdapterError, match=r"adapter .*one is not loaded: vLLM failed: expected target modules in"):
        model.load_lora(str(folder))
    stand_in.say(fault=None)
    assert model.load_lora(str(folder)).lora_name == "one"
    place = facts_of(model).fast.vllm.place
    facts_of(model).fast.vllm.close()
    shutil.rmtree(place)  # it stays with its log


def test_what_is_no_adapter_is_refused(load, live, base, tmp_path):
    model = load()
    with pytest.raises(AdapterError, match="holds no adapter"):
        model.load_lora(str(base))
    with pytest.raises(AdapterError, match="this model carries none"):
        model.save_lora(str(tmp_path / "one"))
    with pytest.raises(NotSupportedYetError, match=r"load_lora gives an adapter to vLLM.*fast_inference=True"):
        live[0].load_lora(str(base))


def test_sampling_params_are_a_public_name():
    assert tunesmith.SamplingParams is SamplingParams
    with pytest.raises(TypeError, match="max_new_tokens"):
        SamplingParams(max_new_tokens=4)
