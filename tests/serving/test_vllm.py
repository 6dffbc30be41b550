"""``fast_inference=True`` with vLLM itself, on a CPU and a real model; see Makefile for its environment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import ROOT
from tests.serving.markers import MARKERS, prompt_of, train_marker
from tests.tiny import tiny_tokenizer

from tunesmith import FastLanguageModel, SamplingParams
from tunesmith.core.errors import ModelError
from tunesmith.engine.modes import adapter_disabled
from tunesmith.models.load import facts_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

TEXTS = ("Name three colours.", "Write a sentence about the sea.", "What is a compiler?", "List the months of spring.")


@pytest.fixture(scope="module", autouse=True)
def _command() -> Iterator[None]:
    """Put the command ``vllm`` of the environment that the Makefile makes on the PATH."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(ROOT / ".venv-vllm" / "bin"), prepend=os.pathsep)
        if find_spec("vllm") is None and shutil.which("vllm") is None:
            pytest.skip("vLLM is not installed: make .venv-vllm/installed")
        yield


@pytest.fixture(scope="module")
def loaded(_command: None, smollm2: Any) -> Iterator[tuple[Any, Any]]:
    """SmolLM2 in float32 with its vLLM, which has been compared with it."""
    model, tokenizer = FastLanguageModel.from_pretrained("smollm2-135m", dtype="float32", fast_inference=True)
    yield model, tokenizer
    facts_of(model).fast.vllm.close()


def as_prompt(tokenizer: Any, text: str) -> str:
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def scores_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def assert_chosen_as(model: Any, found: Any) -> None:
    """Each token of an answer is the likeliest of the live model, or as likely, with the log-probability that it has.

    Where tokens are nearly equal, sums in another order may choose the other.
    """
    answer, start = found.outputs[0], len(found.prompt_token_ids)
    scores = scores_of(model, [*found.prompt_token_ids, *answer.token_ids])[start - 1 : -1]
    for own, token, place in zip(scores, answer.token_ids, answer.logprobs, strict=True):
        assert own.max() - own[token] < 1e-3
        assert abs(own[token].item() - place[token].logprob) < 1e-3


def test_greedy_answers_are_those_of_the_live_model(loaded):
    model, tokenizer = loaded
    prompts = [as_prompt(tokenizer, text) for text in TEXTS]
    greedy = SamplingParams(temperature=0, max_tokens=24, logprobs=1)
    found = model.fast_generate(prompts, sampling_params=greedy, use_tqdm=False)
    for text, answer in zip(prompts, found, strict=True):
        assert answer.prompt_token_ids == tokenizer(text)["input_ids"]
        assert answer.outputs[0].text == tokenizer.decode(answer.outputs[0].token_ids, skip_special_tokens=True)
        assert_chosen_as(model, answer)
    assert {answer.outputs[0].finish_reason for answer in found} <= {"stop", "length"}


def test_settings_have_their_effect(loaded):
    model, tokenizer = loaded
    prompt = as_prompt(tokenizer, TEXTS[0])

    def texts(**settings: Any) -> list[str]:
        asked = SamplingParams(**{"max_tokens": 12, "seed": 5, **settings})
        return [output.text for output in model.fast_generate(prompt, asked, use_tqdm=False)[0].outputs]

    assert texts(n=3) == texts(n=3) and len(set(texts(n=3))) > 1
    whole = texts(temperature=0)[0]
    word = whole.split()[1]
    assert texts(temperature=0, stop=word)[0] == whole.partition(word)[0]
    assert texts(temperature=0, stop=word, include_stop_str_in_output=True)[0].endswith(word)
    ended = model.fast_generate(prompt, SamplingParams(temperature=0, max_tokens=400), use_tqdm=False)[0].outputs[0]
    assert ended.finish_reason == "stop" and ended.token_ids[-1] == tokenizer.eos_token_id
    assert "<|im_end|>" not in ended.text


def answers(loaded: tuple[Any, Any], request: Any) -> list[str]:
    model, tokenizer = loaded
    prompts = [as_prompt(tokenizer, prompt_of(number)) for number in range(3)]
    found = model.fast_generate(prompts, SamplingParams(temperature=0, max_tokens=8), request, use_tqdm=False)
    return [answer.outputs[0].text for answer in found]


def test_an_adapter_answers_as_trained_also_after_it_was_replaced(loaded, smollm2, tmp_path):
    base, tokenizer = smollm2()
    folder = tmp_path / "adapter"
    for marker in (MARKERS["red"], MARKERS["dog"]):
        train_marker(base, tokenizer, folder, marker, targets=["q_proj", "v_proj", "down_proj"], rate=5e-3, prompts=4)
        request = loaded[0].load_lora(str(folder))
        assert answers(loaded, request) == [marker] * 3
    assert not {MARKERS["red"], MARKERS["dog"]} & set(answers(loaded, None))


def test_the_model_in_training_asks_for_its_own_adapter(loaded, tmp_path):
    """Ranks and scales that differ by module, which vLLM itself does not read."""
    model, tokenizer = loaded
    how = {"r": 8, "lora_alpha": 16, "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"down_proj": 40}}
    tuned = FastLanguageModel.get_peft_model(model, **how, use_rslora=True)
    torch.manual_seed(0)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data = 0.01 * torch.randn_like(weight)
    tuned.save_lora(str(tmp_path / "own"))
    asked = SamplingParams(temperature=0, max_tokens=12, logprobs=1)
    prompt = as_prompt(tokenizer, TEXTS[2])
    request = tuned.load_lora(str(tmp_path / "own"))
    assert_chosen_as(tuned, tuned.fast_generate(prompt, asked, request, use_tqdm=False)[0])
    with adapter_disabled(tuned):
        assert_chosen_as(tuned, tuned.fast_generate(prompt, asked, use_tqdm=False)[0])
    tuned.unload()


def processes(word: str) -> list[str]:
    """Return the command lines of this machine that hold ``word``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            text = entry.read_bytes()
        except OSError:
            continue
        if word.encode() in text and entry.parent.name != str(os.getpid()):
            found.append(entry.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_no_process_is_left_when_the_starter_is_killed(smollm2, tmp_path):
    script = """
from tunesmith import FastLanguageModel
from tunesmith.models.load import facts_of
model, _ = FastLanguageModel.from_pretrained("smollm2-135m", dtype="float32", fast_inference=True)
print(facts_of(model).fast.vllm.place, flush=True)
input()
"""
    mark = f"TUNESMITH_TEST={tmp_path}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TUNESMITH_TEST": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as starter:
        assert starter.stdout is not None
        place = Path(starter.stdout.readline().strip())
        assert place.is_dir() and len(processes(mark)) >= 4  # itself, keeper, server, engine
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    for _ in range(300):
        if not processes(mark) and not place.exists():
            break
        time.sleep(0.1)
    assert not processes(mark) and not place.exists()


def test_an_architecture_that_vllm_lacks_is_named(tmp_path):
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    config = OpenAIGPTConfig(vocab_size=331, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "old")
    tiny_tokenizer().save_pretrained(tmp_path / "old")
    with pytest.raises(
        ModelError, match=r"(?s)vLLM ended before it answered for OpenAIGPTLMHeadModel\. Give fast_inf"
    ) as raised:
        FastLanguageModel.from_pretrained(
            str(tmp_path / "old"), dtype="float32", fast_inference=True, use_gradient_checkpointing=False
        )
    log = Path(str(raised.value).rpartition("The whole log: ")[2])
    assert log.is_file()
    shutil.rmtree(log.parent)
