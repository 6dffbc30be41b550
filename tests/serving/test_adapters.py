"""Adapters come, go and change while answers are written, and what cannot be served beside a base is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load, save_file
from tests.export.support import adapt, disturb, loaded
from tests.tiny import save_model

from tunesmith.cli.loading import load_for_answers
from tunesmith.core.errors import AdapterError
from tunesmith.models.prompts import stop_token_ids
from tunesmith.serving.adapters import AdapterShelf, read_adapter
from tunesmith.serving.engine import Engine
from tunesmith.serving.lora import Routing
from tunesmith.serving.request import Request

PROMPT = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture
def shelf(base_folder):
    return AdapterShelf(*loaded(base_folder), most=2)


def test_the_least_recently_used_leave_memory_and_come_back(shelf, adapter_folders):
    for name in ("a", "b", "c"):
        shelf.add(name, adapter_folders[name])
    assert shelf.loaded == ["b", "c"]
    assert shelf.get("b") is shelf.get("b")
    again = shelf.get("a")
    assert shelf.loaded == ["b", "a"]
    assert set(shelf.folders) == {"a", "b", "c"}
    first = read_adapter("a", adapter_folders["a"], shelf._model, shelf._tokenizer)
    assert all(torch.equal(again.pairs[name][1], first.pairs[name][1]) for name in first.pairs)
    assert again.nbytes == first.nbytes > 0


def test_names_are_taken_once_replaced_on_demand_and_forgotten(shelf, adapter_folders):
    shelf.add("x", adapter_folders["a"])
    with pytest.raises(AdapterError, match=r"'x' is loaded already, from .*Unload it first"):
        shelf.add("x", adapter_folders["b"])
    assert shelf.add("x", adapter_folders["b"], replace=True).folder == adapter_folders["b"]
    shelf.remove("x")
    for call in (shelf.get, shelf.remove):
        with pytest.raises(AdapterError, match="there is no adapter 'x'"):
            call("x")


def test_a_replaced_adapter_changes_new_answers_and_not_those_begun(start, adapter_folders):
    engine = start({"x": adapter_folders["a"], "a": adapter_folders["a"], "b": adapter_folders["b"]})
    by_a, by_b = (engine.generate([PROMPT], adapters=name, max_new_tokens=40)[0] for name in "ab")
    request = Request(tuple(engine.tokenizer("the cat sat")["input_ids"]), 60, "x", ignore_end=True)
    expected = "".join(delta.text for delta in engine.stream(request))
    stream = engine.stream(request)
    text = next(stream).text
    engine.shelf.add("x", adapter_folders["b"], replace=True)
    assert engine.generate([PROMPT, PROMPT], adapters=["x", "a"], max_new_tokens=40) == [by_b, by_a]
    engine.unload("x")
    assert text + "".join(delta.text for delta in stream) == expected


def test_the_stack_of_a_step_holds_on_to_what_may_come_again_and_lets_go_of_the_unloaded(base_folder, adapter_folders):
    shelf = AdapterShelf(*loaded(base_folder))
    a, b, c = (shelf.add(name, adapter_folders[name]) for name in "abc")
    routing = Routing(shelf.holds)
    routing.begin([a, b], [0, 1])
    stack = routing._stack
    routing.begin([b, None], [0, 1])
    assert routing._stack is stack
    routing.begin([None, None], [0, 1])
    assert routing.parts == {}
    routing.begin([a, a], [0, 1])
    assert all(mask is None for _, _, mask in routing.parts.values())
    shelf.remove("a")
    routing.begin([b, c], [0, 1])
    assert routing._held == [b, c]
    routing.clear()
    assert routing._held == [] and routing._stack == {}


def test_an_adapter_with_a_template_of_its_own_is_asked_by_it(base_folder, tmp_path, start):
    model, tokenizer = loaded(base_folder)
    disturb(adapt(model)).save_pretrained(tmp_path / "other")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "other")
    engine = start({"other": tmp_path / "other"})
    assert engine.tokenizer_of("other").chat_template == tokenizer.chat_template != engine.tokenizer.chat_template
    assert engine.tokenizer_of(None) is engine.tokenizer


def test_its_own_end_of_turn_ends_its_answers(base_folder, tmp_path):
    model, tokenizer = loaded(base_folder)
    disturb(adapt(model)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    plain, own = loaded(base_folder)
    own.chat_template = None
    engine = Engine(plain, own)
    try:
        engine.shelf.add("other", tmp_path / "other")
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        for name, ends in ((None, {own.eos_token_id}), ("other", {own.eos_token_id, end})):
            ticket = engine.submit(Request((5, 6), 2, name), lambda delta: None)
            assert ticket.ends == ends
    finally:
        engine.close(drain=False)


def test_the_base_of_a_run_and_other_adapters_keep_the_base_s_template_and_ends(base_folder, adapter_folders, tmp_path):
    model, tokenizer = loaded(base_folder)
    disturb(adapt(model)).save_pretrained(tmp_path / "run")
    tokenizer.chat_template, tokenizer.eos_token = "{{ messages[0]['content'] }}", "<|pad|>"
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "run")
    shutil.copytree(adapter_folders["a"], tmp_path / "bare")
    engine = Engine(*load_for_answers(str(tmp_path / "run"), dtype="float32", attach=False))
    try:
        plain = loaded(base_folder)[1]
        for name, own in ((None, plain), ("run", tokenizer), ("bare", plain)):
            if name is not None:
                engine.shelf.add(name, tmp_path / name)
            found = engine.tokenizer_of(name)
            assert (found.chat_template, len(found)) == (own.chat_template, len(own))
            ticket = engine.submit(Request((5, 6), 2, name), lambda delta: None)
            assert ticket.ends == set(stop_token_ids(engine.model, own)) and own.eos_token_id in ticket.ends
    finally:
        engine.close(drain=False)


def test_a_base_without_a_template_is_asked_by_that_of_the_run(base_folder, adapter_folders, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    run = shutil.copytree(adapter_folders["a"], tmp_path / "run")
    loaded(base_folder)[1].save_pretrained(run)
    edit(run, base_model_name_or_path=str(base))
    assert loaded(base)[1].chat_template is None
    assert load_for_answers(str(run), attach=False)[1].chat_template == loaded(base_folder)[1].chat_template


def test_an_adapter_of_another_vocabulary_is_refused(shelf, base_folder, adapter_folders, tmp_path):
    other = shutil.copytree(adapter_folders["a"], tmp_path / "other")
    loaded(base_folder)[1].save_pretrained(other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"<|pad|>"', '"<|fill|>"'), encoding="utf-8")
    with pytest.raises(AdapterError, match="another vocabulary than the base has"):
        shelf.add("other", other)


KINDS = {
    "dora": ({"use_dora": True}, "uses DoRA"),
    "whole": ({"modules_to_save": ["lm_head"]}, "uses modules that train whole"),
    "bias": ({"bias": "lora_only"}, "trained biases"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "no matrix of a linear layer"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_need_a_merge_say_so(base_folder, tmp_path, shelf, kind):
    arguments, message = KINDS[kind]
    disturb(adapt(loaded(base_folder)[0], **arguments)).save_pretrained(tmp_path / kind)
    with pytest.raises(AdapterError, match=rf"{message}.*Merge it \(tunesmith export\)"):
        shelf.add("x", tmp_path / kind)
    assert shelf.folders == {}


@pytest.fixture
def copy(adapter_folders, tmp_path):
    return shutil.copytree(adapter_folders["a"], tmp_path / "copy")


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_damaged_and_foreign_files_are_refused(shelf, copy, tmp_path):
    weights = copy / "adapter_model.safetensors"
    whole = weights.read_bytes()
    stored = load(whole)
    name = next(name for name in stored if "lora_B" in name)
    weights.write_bytes(whole[:200])
    with pytest.raises(AdapterError, match="is damaged"):
        shelf.add("x", copy)
    for change, message in (
        ({name: torch.full_like(stored[name], float("nan"))}, "infinite values or NaN"),
        ({name: stored[name][:-1]}, "does not fit the base: .* takes"),
        ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": stored[name].T}, "lora_B of .* is missing"),
    ):
        save_file({**stored, **{key: value.contiguous() for key, value in change.items()}}, weights)
        with pytest.raises(AdapterError, match=message):
            shelf.add("x", copy)
    both = {f"base_model.model.model.layers.7.q_proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    save_file(both, weights)
    with pytest.raises(AdapterError, match=r"has no linear module model\.layers\.7\.q_proj"):
        shelf.add("x", copy)
    save_file({**stored, "base_model.model.nowhere.base_layer.weight": torch.ones(4)}, weights)
    with pytest.raises(AdapterError, match=r"nowhere\.base_layer\.weight, which is no matrix"):
        shelf.add("x", copy)
    weights.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
        shelf.add("x", copy)
    save_model(tmp_path / "model")
    with pytest.raises(AdapterError, match="holds no adapter"):
        shelf.add("x", tmp_path / "model")


def test_what_was_trained_otherwise_than_it_is_served_is_refused_or_said(shelf, copy):
    edit(copy, task_type="SEQ_CLS")
    with pytest.raises(AdapterError, match="trained for SEQ_CLS and writes no text"):
        shelf.add("x", copy)
    edit(copy, task_type="CAUSAL_LM", lora_alpha="x")
    with pytest.raises(AdapterError, match="are no numbers"):
        shelf.add("x", copy)
    edit(copy, lora_alpha=8)
    assert shelf.add("y", copy).notes == ()
    record = copy / "base.json"
    for change, message in (
        ({"vocabulary": 400}, "with 400 rows of vocabulary, the base has its own"),
        ({"stretch": {"scaling": {"rope_type": "yarn", "factor": 2.0}, "window": 1024}}, "a window of 1024 tokens"),
    ):
        record.write_text(json.dumps(change))
        with pytest.raises(AdapterError, match=message):
            shelf.add("x", copy)
    record.write_text(json.dumps({"width": "4bit"}))
    edit(copy, base_model_name_or_path="/nowhere/at/all")
    adapter = shelf.add("x", copy)
    assert "trained on a base in 4 bits and is served on one in full" in adapter.notes[0]
    assert "cannot be seen" in adapter.notes[1]


def test_only_lora_is_served(base_folder, shelf, tmp_path):
    from peft import LoHaConfig, get_peft_model

    config = LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(loaded(base_folder)[0], config).save_pretrained(tmp_path / "loha")
    with pytest.raises(AdapterError, match="is of the kind LOHA; only LORA is served"):
        shelf.add("x", tmp_path / "loha")


def test_an_adapter_with_an_end_token_of_its_own_ends_there(base_folder, shelf, tmp_path):
    model, tokenizer = loaded(base_folder)
    disturb(adapt(model)).save_pretrained(tmp_path / "other")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "other")
    adapter = shelf.add("x", tmp_path / "other")
    assert adapter.tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id in adapter.ends


def test_what_differs_from_the_training_is_said_when_an_adapter_is_added(shelf, copy, caplog):
    (copy / "base.json").write_text(json.dumps({"width": "4bit"}))
    shelf.add("x", copy)
    assert "adapter x: it was trained on a base in 4 bits and is served on one in full" in caplog.text
