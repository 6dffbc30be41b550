from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from tunesmith import FastLanguageModel, FastModel, get_chat_template
from tunesmith.core.errors import ModelError, SettingsError, TunesmithError
from tunesmith.core.versions import keep_softcap
from tunesmith.engine.install import engine_of
from tunesmith.engine.read import is_quantized
from tunesmith.models import gguf_cache
from tunesmith.models import load as models_load
from tunesmith.models.aliases import find_model
from tunesmith.models.load import empty_causal_lm, facts_of, stored_bytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with its tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.save_model(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def load(folder: Path | str, **arguments: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(folder), **{"max_seq_length": 256, **arguments})


def test_a_folder_is_loaded_with_its_facts(saved: Path) -> None:
    model, tokenizer = load(saved, dtype="float32")
    facts = facts_of(model)
    assert (facts.name, facts.window, facts.dtype.name, facts.dtype.reason) == (str(saved), 256, "float32", "asked for")
    assert facts.notes == []
    assert tokenizer.chat_template == tiny.tiny_tokenizer().chat_template
    own = tiny.tiny_model("llama")
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items())
    assert FastModel.get_peft_model is FastLanguageModel.get_peft_model


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), (torch.float32, torch.float32)])
def test_the_dtype_asked_for(dtype: Any, expected: torch.dtype, saved: Path) -> None:
    model, _ = load(saved, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="the system does not tell what of a file is mapped")
@pytest.mark.parametrize("width", ["4bit", "8bit"])
def test_weights_that_are_quantized_leave_no_file_in_memory(
    width: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mapped() -> int:
        """Return the resident bytes of the weight file."""
        parts = Path("/proc/self/smaps").read_text().split(str(tmp_path / "model.safetensors"))[1:]
        return sum(int(part.partition("Rss:")[2].split()[0]) * 1024 for part in parts)

    tiny.tiny_model("llama", hidden_size=256, intermediate_size=2048, num_hidden_layers=4).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    seen: list[int] = []
    monkeypatch.setattr(models_load, "_leave_files", lambda model: seen.append(mapped()))
    model, _ = load(tmp_path, dtype="float32", **{f"load_in_{width}": True})
    assert size > 25 * 2**20 and seen[0] < size // 10
    # What is read later comes from the file again.
    own = tiny.tiny_model("llama", hidden_size=256, intermediate_size=2048, num_hidden_layers=4).state_dict()
    assert torch.equal(model.model.embed_tokens.weight, own["model.embed_tokens.weight"])


@pytest.mark.parametrize("width", ["4bit", "8bit"])
def test_layers_whose_weights_a_model_reads_itself_stay_whole(width: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "mamba")
    model, _ = load(tmp_path, dtype="float32", **{f"load_in_{width}": True})
    names = {name.split(".")[-1] for name, module in model.named_modules() if is_quantized(module)}
    assert names == {"in_proj", "x_proj"}
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        near = tiny.tiny_model("mamba").eval()(ids).logits
        assert (model(ids).logits - near).norm() < 0.3 * near.norm()


def test_the_window(saved: Path) -> None:
    assert facts_of(load(saved, max_seq_length=None)[0]).window == tiny.WINDOW
    only = FastLanguageModel.from_pretrained(str(saved), max_sequence_length=100)
    assert facts_of(only[0]).window == 100
    for asked in (64, 2048):
        with pytest.raises(SettingsError, match="max_seq_length and max_sequence_length are the same setting"):
            load(saved, max_seq_length=asked, max_sequence_length=32)


def test_a_window_that_nobody_asked_for_is_the_models_own(saved: Path) -> None:
    """The default of 2048 is no request: a model with 512 positions loads with 512."""
    assert facts_of(FastLanguageModel.from_pretrained(str(saved))[0]).window == tiny.WINDOW


def test_attention_that_is_asked_for(saved: Path) -> None:
    assert load(saved, attn_implementation="eager")[0].config._attn_implementation == "eager"


def test_a_softcap_is_never_left_out() -> None:
    """Older transformers choose SDPA for Gemma 2, which knows no softcap."""
    model = tiny.tiny_model("gemma2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match="attn_implementation='sdpa' leaves out the softcap of Gemma2ForCausalLM"):
        keep_softcap(model, "sdpa")
    keep_softcap(model)
    assert model.config._attn_implementation == "eager"
    plain = tiny.tiny_model("llama")
    keep_softcap(plain, "sdpa")
    assert plain.config._attn_implementation == "sdpa"


def test_a_template_is_put_on_the_tokenizer(folder: Path) -> None:
    file = folder / "own.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", encoding="utf-8")
    _, tokenizer = load(folder, chat_template=str(file))
    assert tokenizer.chat_template == file.read_text(encoding="utf-8")
    assert get_chat_template(tokenizer, "chatml") is tokenizer
    assert tokenizer.chat_template == tiny.tiny_tokenizer().chat_template


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights(folder))
    change(tensors)
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def delete_tensor(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    edit(folder, change)


def reshape_tensor(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(31)

    edit(folder, change)


def cut(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-1000])


def no_weights(folder: Path) -> None:
    weights(folder).unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ', encoding="utf-8")


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lamma"}', encoding="utf-8")


def no_causal_lm(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (delete_tensor, r"1 weights are missing or have another shape than config.json says .*layers.1.mlp.up_proj"),
        (reshape_tensor, r"model.norm.weight|cannot be loaded"),
        (cut, "a .safetensors file is corrupt or cut short"),
        (no_weights, "cannot be loaded"),
        (bad_config, "config"),
        (unknown_architecture, "lamma"),
        (no_causal_lm, "cannot be loaded"),
        (no_tokenizer, r"has no tokenizer that can be read. Save one beside it: tokenizer.save_pretrained"),
        (bad_tokenizer, "model .*"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_folders_that_cannot_be_loaded(harm: Callable[[Path], None], message: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_hub_id_without_network_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"model 'nobody/smollm2-135' is no local folder and the hub did not give it"):
        load("nobody/smollm2-135")


# ---- GGUF ----


def test_gguf_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model at all")
    with pytest.raises(ModelError, match=r"model.gguf is no GGUF file \(it does not begin with GGUF\)"):
        load(file)
    file.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 64)
    with pytest.raises(ModelError, match=r"model.gguf cannot be read as a GGUF model"):
        load(file)
    assert [path.name for path in (tmp_path / "cache" / "gguf").iterdir()] == ["lock"], "nothing half converted is left"


def test_a_gguf_that_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.models.aliases import find_model

    try:
        whole = Path(find_model("smollm2-135m").path)
    except ModelError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "cut.gguf"
    with whole.open("rb") as source:
        file.write_bytes(source.read(1_000_000))
    with pytest.raises(ModelError, match=r"cut.gguf cannot be read as a GGUF model"):
        load(file)


def test_a_gguf_is_converted_once_by_whoever_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[str] = []

    def convert(file: Path, folder: Path) -> None:
        conversions.append(file.name)
        time.sleep(0.05)
        (folder / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_cache, "_convert", convert)
    file, longer = tmp_path / "model.gguf", tmp_path / "model-large.gguf"
    file.write_bytes(b"GGUF one")
    longer.write_bytes(b"GGUF large")
    threads = [threading.Thread(target=gguf_cache.converted_gguf, args=(file,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert conversions == ["model.gguf"]
    kept = gguf_cache.converted_gguf(longer)
    first = gguf_cache.converted_gguf(file)
    # Another file of the same name, in whatever folder, has a conversion of its own.
    file.write_bytes(b"GGUF two")
    second = gguf_cache.converted_gguf(file)
    assert conversions == ["model.gguf", "model-large.gguf", "model.gguf"]
    assert second != first and all(folder.exists() for folder in (first, second, kept))


# ---- arguments ----


@pytest.mark.parametrize("mode", ["auto", "selective", "offload"])
def test_every_kind_of_checkpointing_is_taken(mode: str, saved: Path) -> None:
    model, _ = load(saved, use_gradient_checkpointing=mode)
    assert facts_of(model).checkpointing == mode


def test_an_empty_model_has_the_shapes_of_the_loaded_one(saved: Path) -> None:
    model, _ = load(saved, dtype="float32")
    source = find_model(str(saved))
    empty = empty_causal_lm(source, dtype="float32")
    shapes = {name: (weight.shape, weight.dtype) for name, weight in empty.named_parameters()}
    assert shapes == {name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()}
    assert all(weight.is_meta for weight in empty.parameters())
    assert str(engine_of(empty).plan) == str(engine_of(model).plan)
    assert stored_bytes(source) == {"F32": sum(weight.nbytes for weight in model.parameters())}


def test_a_header_that_is_cut_short_is_said(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    os.truncate(folder / "model.safetensors", 20)
    with pytest.raises(ModelError, match=r"model\.safetensors is corrupt or cut short"):
        stored_bytes(find_model(str(folder)))


def test_unsloths_own_defaults_ask_for_nothing(saved: Path) -> None:
    model, _ = load(saved, load_in_4bit=False, use_gradient_checkpointing="unsloth", rope_scaling=None)
    FastLanguageModel.get_peft_model(model, loftq_config={}, random_state=3407, bias="none")


def test_an_unknown_argument_names_the_nearest(saved: Path) -> None:
    with pytest.raises(
        TypeError, match=r"from_pretrained\(\) got an unknown argument 'max_seq_lenght'. Did you mean 'max_seq_length'"
    ):
        load(saved, max_seq_lenght=3)
    with pytest.raises(
        TypeError, match=r"get_peft_model\(\) got an unknown argument 'lora_aplha'. Did you mean 'lora_alpha'"
    ):
        FastLanguageModel.get_peft_model(tiny.tiny_model("llama"), lora_aplha=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_16bit": True, "dtype": "float32"}, "load_in_16bit=True and dtype=float32: give one of them"),
        ({"load_in_16bit": False}, "load_in_16bit=False names no other precision"),
        ({"use_gradient_checkpointing": 3}, "allowed are True, False, 'selective'"),
    ],
)
def test_arguments_that_contradict_each_other(arguments: dict[str, Any], message: str, saved: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        load(saved, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_4bit": "false"}, "load_in_4bit = 'false': true or false is needed"),
        ({"full_finetuning": "no"}, "full_finetuning = 'no': true or false is needed"),
        ({"load_in_16bit": "no"}, "load_in_16bit = 'no': true or false is needed"),
        ({"trust_remote_code": "no"}, "trust_remote_code = 'no': true or false is needed"),
        ({"max_seq_length": "256"}, "max_seq_length = '256': a whole number or nothing is needed"),
        ({"max_seq_length": -5}, "max_seq_length = -5: input should be greater than or equal to 1"),
        ({"max_seq_length": 0}, "max_seq_length = 0"),
        ({"max_seq_length": 99.5}, "max_seq_length = 99.5: a whole number or nothing is needed"),
        ({"max_seq_length": True}, "max_seq_length = True: True is a truth value"),
        ({"max_seq_length": float("nan")}, "max_seq_length = nan"),
        ({"dtype": 32}, "dtype '32' is not known"),
        ({"dtype": torch.int8}, "dtype 'torch.int8' is not known"),
        ({"use_gradient_checkpointing": [1]}, "allowed are True, False"),
        ({"model_name": 3}, "model 3 is neither a text nor a path"),
        ({"task_type": "SEQ_CLS", "num_labels": "x"}, "num_labels = 'x': a whole number or nothing is needed"),
    ],
)
def test_values_of_another_type_are_refused(arguments: dict[str, Any], message: str, saved: Path) -> None:
    with pytest.raises(TunesmithError, match=message):
        FastLanguageModel.from_pretrained(**{"model_name": str(saved), **arguments})


@pytest.mark.parametrize("window", ["64", 0, -1, True])
def test_a_window_of_the_adapter_that_is_none(window: Any) -> None:
    with pytest.raises(SettingsError, match=f"get_peft_model: max_seq_length = {window!r}"):
        FastLanguageModel.get_peft_model(tiny.tiny_model("llama"), max_seq_length=window)


def test_paths_and_numbers_of_numpy_are_taken(saved: Path, tmp_path: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        saved, max_seq_length=np.int64(1024), load_in_8bit=np.bool_(True), dtype="float32", cache_dir=tmp_path / "hub"
    )
    assert (facts_of(model).name, facts_of(model).window, facts_of(model).width) == (str(saved), 1024, "8bit")
    adapted = FastLanguageModel.get_peft_model(model, temporary_location=tmp_path / "spill", r=np.int64(4))
    adapted.save_pretrained(tmp_path / "adapter")
    assert facts_of(FastLanguageModel.from_pretrained(tmp_path / "adapter")[0]).width == "8bit"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_there_is_said(saved: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(saved, device_map="cuda")


def test_the_window_of_the_adapter_is_that_of_the_model(saved: Path) -> None:
    model, _ = load(saved, max_seq_length=64)
    with pytest.raises(SettingsError, match="max_seq_length=128 is above the 64 tokens that the model was loaded with"):
        FastLanguageModel.get_peft_model(model, max_seq_length=128)
    FastLanguageModel.get_peft_model(model, max_seq_length=64)


def test_a_model_of_someone_else_can_be_adapted_with_a_window() -> None:
    """One that from_pretrained of ours has not seen carries no facts yet."""
    with pytest.raises(SettingsError, match="max_seq_length=600 is above the 512"):
        FastLanguageModel.get_peft_model(tiny.tiny_model("llama"), max_seq_length=600)


def test_every_error_is_one_of_ours(folder: Path) -> None:
    for text in (
        "",
        "[]",
        "null",
        '{"model_type": 3}',
        '{"model_type": "llama", "hidden_size": "x"}',
        json.dumps({"a": 1}),
    ):
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(TunesmithError):
            load(folder)


def test_a_seed_for_nothing_is_refused(saved: Path) -> None:
    with pytest.raises(
        SettingsError, match="random_state=1 would seed new heads, and a causal language model gets none"
    ):
        load(saved, random_state=1)
