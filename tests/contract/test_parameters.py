"""Every argument of ``from_pretrained`` and ``get_peft_model``: one row shows its effect, one its refusal.

The tables below are walked against the signatures: an argument without a row fails, and so does a row without an
argument. An effect is something that can be seen from outside and that would not be there without the argument.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from tests import tiny, tiny_vision
from tests.training.support import trainable
from tests.vllm_support import scores_of, stand_in_for
from transformers import LlamaForCausalLM

from tunesmith import FastLanguageModel, FastVisionModel
from tunesmith.adapters.settings import FILTERS
from tunesmith.core.errors import ModelError, TunesmithError
from tunesmith.engine.host import is_on_host
from tunesmith.engine.install import engine_of
from tunesmith.engine.policies import Policy
from tunesmith.models.load import facts_of


@dataclass(frozen=True)
class Row:
    """``effect`` says whether the argument's effect is there; ``refused`` are arguments that end with ``message``.

    None stands where an argument is held against something and does no more.
    """

    effect: Callable[..., Any] | None
    refused: dict[str, Any]
    message: str


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with its tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.save_model(folder)
    return folder


def load(place: Any, **arguments: Any) -> Any:
    """Return the model that ``from_pretrained`` gives, in float32 unless another dtype is asked for."""
    return FastLanguageModel.from_pretrained(str(place), **{"dtype": "float32", **arguments})[0]


@pytest.fixture
def told(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``told(**arguments)``: the words that a stand-in for vLLM is started with for the tiny model."""

    def begin(**arguments: Any) -> str:
        live = FastLanguageModel.from_pretrained(str(saved), dtype="float32")
        stand_in = stand_in_for(scores_of(*live), tmp_path, monkeypatch)
        facts_of(load(saved, fast_inference=True, **arguments)).fast.vllm.close()
        return " ".join(stand_in.started["words"])

    return begin


def hub_cache(folder: Path, saved: Path) -> str:
    """Make a hub cache with the repository someone/tiny: ``main`` as saved, the revision ``other`` with 1 layer."""
    repository = folder / "models--someone--tiny"
    if repository.exists():
        return str(folder)
    for name, layers in (("main", 2), ("other", 1)):
        snapshot = repository / "snapshots" / name
        shutil.copytree(saved, snapshot)
        config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
        (snapshot / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}), encoding="utf-8")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(name, encoding="utf-8")
    return str(folder)


def layers_of(model: Any) -> int:
    return model.config.num_hidden_layers


class Hub(BaseHTTPRequestHandler):
    """Has nothing, and remembers the authorizations of those who ask for repositories of someone's."""

    seen: ClassVar[list[str | None]] = []

    def do_HEAD(self) -> None:
        if "someone" in self.path:
            self.seen.append(self.headers.get("Authorization"))
        self.send_error(404)

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None: ...


@cache
def asked_of_hub() -> dict[str, list[str | None]]:
    """Return the authorizations that a hub (on loopback) is sent with each argument, none where nothing is asked."""
    from huggingface_hub import constants

    found = {}
    with HTTPServer(("127.0.0.1", 0), Hub) as server, pytest.MonkeyPatch.context() as patch:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        for name, value in (("token", "hf_secret"), ("local_files_only", True)):
            Hub.seen.clear()
            with suppress(ModelError):
                FastLanguageModel.from_pretrained("someone/else", **{name: value})
                raise AssertionError("there is no such model")
            found[name] = sorted(set(Hub.seen), key=str)
        server.shutdown()
    return found


def code_of_a_model(folder: Path, saved: Path) -> str:
    """Copy ``saved`` to ``folder`` with a config class of its own, which only ``trust_remote_code`` may run."""
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (folder / "config.json").write_text(
        json.dumps({**config, **own, "architectures": ["OwnForCausalLM"]}), encoding="utf-8"
    )
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = Own\n",
        encoding="utf-8",
    )
    return str(folder)


LABELS = {0: "no", 1: "yes"}

LOADING: dict[str, Row] = {
    "model_name": Row(
        lambda saved: facts_of(load(saved)).name == str(saved), {"model_name": "smolm2-135m"}, "smollm2-135m"
    ),
    "max_seq_length": Row(
        lambda saved: facts_of(load(saved, max_seq_length=64)).window == 64,
        {"max_seq_length": 2049},
        "above 4 times this model's own window of 512",
    ),
    "max_sequence_length": Row(
        lambda saved: facts_of(load(saved, max_sequence_length=64)).window == 64,
        {"max_seq_length": 64, "max_sequence_length": 32},
        "are the same setting",
    ),
    "dtype": Row(
        lambda saved: load(saved, dtype="bfloat16").dtype == torch.bfloat16, {"dtype": "float7"}, "float7"
    ),
    "load_in_4bit": Row(
        lambda saved: facts_of(load(saved, load_in_4bit=True)).width == "4bit",
        {"load_in_4bit": True, "load_in_8bit": True},
        "load_in_4bit=True and load_in_8bit=True: give one",
    ),
    "load_in_8bit": Row(
        lambda saved: facts_of(load(saved, load_in_8bit=True)).width == "8bit",
        {"load_in_8bit": True, "load_in_16bit": True},
        "load_in_8bit=True and load_in_16bit=True: give one",
    ),
    "load_in_fp8": Row(
        lambda saved, monkeypatch: facts_of(in_float8(saved, monkeypatch)).width == "fp8-block",
        {"load_in_fp8": "blocks"},
        "load_in_fp8='blocks': allowed are False, True, 'row' and 'block'",
    ),
    "load_in_16bit": Row(
        lambda saved: facts_of(load(adapter_on_4bit(saved), load_in_16bit=True, dtype=None)).width is None,
        {"load_in_16bit": True, "dtype": "float32"},
        "load_in_16bit=True and dtype=float32",
    ),
    "full_finetuning": Row(
        lambda saved: all(p.requires_grad for p in load(saved, full_finetuning=True).parameters()),
        {"full_finetuning": True, "load_in_fp8": True},
        "load_in_fp8=True stores a base that does not train",
    ),
    "qat_scheme": Row(
        lambda saved: facts_of(load(saved, full_finetuning=True, qat_scheme="int8")).qat.name == "int8",
        {"qat_scheme": "int8"},
        "give full_finetuning=True",
    ),
    "rope_scaling": Row(
        lambda saved: load(saved, max_seq_length=1024, rope_scaling="yarn").config.rope_parameters["factor"] == 2,
        {"max_seq_length": 1024, "rope_scaling": "yran"},
        "Did you mean 'yarn'",
    ),
    "use_gradient_checkpointing": Row(
        lambda saved: engine_of(load(saved, use_gradient_checkpointing=True)).policies == [Policy.FULL] * 2,
        {"use_gradient_checkpointing": "often"},
        "allowed are True, False",
    ),
    "attn_implementation": Row(
        lambda saved: load(saved, attn_implementation="eager").config._attn_implementation == "eager",
        {"attn_implementation": "flsh"},
        "flsh",
    ),
    "chat_template": Row(
        lambda saved, tmp_path: template_of(saved, chat_template=template_in(tmp_path)) == "{{ messages }}",
        {"chat_template": "chatlm"},
        "Did you mean 'chatml'",
    ),
    "device_map": Row(
        lambda saved: load(saved, device_map={"": "meta"}).device.type == "meta",
        {"device_map": "sideways"},
        "sideways|device_map",
    ),
    "token": Row(
        lambda: asked_of_hub()["token"] == ["Bearer hf_secret"],
        {"model_name": "someone/else", "token": "hf_secret"},
        "no local folder and the hub did not give it",
    ),
    "revision": Row(
        lambda saved, tmp_path: [
            layers_of(load("someone/tiny", cache_dir=hub_cache(tmp_path / "cache", saved), revision=revision))
            for revision in ("main", "other")
        ]
        == [2, 1],
        {"model_name": "someone/tiny", "revision": "nowhere"},
        "the hub did not give it",
    ),
    "cache_dir": Row(
        lambda saved, tmp_path: layers_of(load("someone/tiny", cache_dir=hub_cache(tmp_path / "cache", saved))) == 2,
        {"model_name": "someone/tiny", "cache_dir": "/nowhere/at/all"},
        "the hub did not give it",
    ),
    "local_files_only": Row(
        lambda: asked_of_hub()["local_files_only"] == [] != asked_of_hub()["token"],
        {"model_name": "someone/tiny", "local_files_only": True},
        "the hub did not give it",
    ),
    "trust_remote_code": Row(
        lambda saved, tmp_path: type(
            load(code_of_a_model(tmp_path / "code", saved), trust_remote_code=True)
        ).__name__ == "OwnForCausalLM",
        {"model_name": code_of_a_model},
        "trust_remote_code",
    ),
    "task_type": Row(
        lambda saved: type(load(saved, task_type="SEQ_CLS", num_labels=3)).__name__ == "LlamaForSequenceClassification",
        {"task_type": "SEQ_CLASS"},
        "SEQ_CLS",
    ),
    "num_labels": Row(
        lambda saved: load(saved, task_type="SEQ_CLS", num_labels=3).score.out_features == 3,
        {"num_labels": 3},
        "num_labels, id2label and label2id have no effect on CAUSAL_LM",
    ),
    "id2label": Row(
        lambda saved: load(saved, task_type="SEQ_CLS", id2label=LABELS).config.id2label == LABELS,
        {"task_type": "SEQ_CLS", "id2label": {0: "no", 2: "yes"}},
        "must be numbered 0 to 1",
    ),
    "label2id": Row(
        lambda saved: load(saved, task_type="SEQ_CLS", label2id={"no": 0, "yes": 1}).config.id2label == LABELS,
        {"task_type": "SEQ_CLS", "id2label": {0: "no", 1: "yes"}, "label2id": {"yes": 0, "no": 1}},
        "do not agree",
    ),
    "random_state": Row(
        lambda saved: differ(*(
            [load(saved, task_type="SEQ_CLS", num_labels=2, random_state=seed).score.weight] for seed in (1, 2)
        )),
        {"random_state": -1},
        "random_state",
    ),
    "auto_model": Row(
        lambda saved: type(load(saved, auto_model=LlamaForCausalLM)) is LlamaForCausalLM,
        {"auto_model": "AutoModelForCausalLM"},
        "auto_model",
    ),
    "resize_model_vocab": Row(
        lambda saved: len(load(saved, resize_model_vocab=340).get_input_embeddings().weight) == 340,
        {"resize_model_vocab": 300},
        "smaller than the tokenizer",
    ),
    "offload_embedding": Row(
        # Without a GPU the embedding is in host memory already, and a line says so.
        lambda saved, caplog: is_on_host(load(saved, offload_embedding=True).get_input_embeddings())
        or "host memory already" in caplog.text,
        {"offload_embedding": True, "full_finetuning": True},
        "Give one of them",
    ),
    "fast_inference": Row(
        lambda told: "--enable-lora" in told(),
        {"fast_inference": True, "full_finetuning": True},
        "fast_inference=True and full_finetuning=True: vLLM has weights of its own",
    ),
    "gpu_memory_utilization": Row(
        None, {"gpu_memory_utilization": 0.9}, "gpu_memory_utilization=0.9 is an argument of vLLM"
    ),
    "max_lora_rank": Row(
        lambda told: "--max-lora-rank 32" in told(max_lora_rank=32),
        {"max_lora_rank": 32},
        "max_lora_rank=32 is an argument of vLLM",
    ),
    "float8_kv_cache": Row(
        lambda told: "--kv-cache-dtype fp8" in told(float8_kv_cache=True),
        {"float8_kv_cache": True},
        "float8_kv_cache=True is an argument of vLLM",
    ),
    "torch_dtype": Row(
        lambda saved: load(saved, torch_dtype="bfloat16", dtype=None).dtype == torch.bfloat16,
        {"torch_dtype": "bfloat16", "dtype": "float32"},
        "dtype and torch_dtype are the same setting",
    ),
    "unknown": Row(
        lambda saved: load(saved, unsloth_force_compile=True, fix_tokenizer=True, fullgraph=False, text_only=False),
        {"max_seq_lenght": 64},
        "Did you mean 'max_seq_length'",
    ),
}  # fmt: skip


ABSENT: dict[str, tuple[dict[str, Any], str]] = {
    "fast_inference": ({"fast_inference": True}, "fast_inference=True generates through .* vllm.*fast_inference=False"),
    "gpu_memory_utilization": (
        {"fast_inference": True, "gpu_memory_utilization": 0.9},
        "gpu_memory_utilization=0.9 is for a GPU|fast_inference=True generates through",
    ),
    "load_in_fp8": ({"load_in_fp8": True}, "load_in_fp8='row' needs a GPU that computes in float8"),
}
"""Arguments whose effect needs a package or a GPU that are not here: they are refused with that reason."""


def in_float8(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("tunesmith.models.settings.computes_float8", lambda device: True)
    return load(saved, load_in_fp8="block")


def template_of(place: Any, **arguments: Any) -> str:
    return FastLanguageModel.from_pretrained(str(place), dtype="float32", **arguments)[1].chat_template


def template_in(folder: Path) -> str:
    (folder / "own.jinja").write_text("{{ messages }}", encoding="utf-8")
    return str(folder / "own.jinja")


def adapter_on_4bit(saved: Path) -> Path:
    folder = saved.parent / "adapter-on-4bit"
    if not folder.exists():
        FastLanguageModel.get_peft_model(load(saved, load_in_4bit=True), r=2).save_pretrained(folder)
    return folder


def adapt(family: str = "llama", **arguments: Any) -> Any:
    """Return a tiny model with the adapter that ``get_peft_model`` gives it."""
    settings = {"r": 4, "use_gradient_checkpointing": False, **arguments}
    return FastLanguageModel.get_peft_model(tiny.tiny_model(family), **settings)


def layer_of(model: Any) -> Any:
    return model.get_base_model().model.layers[0]


def adapted(model: Any) -> set[str]:
    """Return the adapted modules as ``layer.name``."""
    found = (name.partition(".lora_A")[0].split(".") for name in trainable(model) if ".lora_A" in name)
    return {f"{parts[4]}.{parts[-1]}" for parts in found}


def starts_of(**arguments: Any) -> list[torch.Tensor]:
    return [weight for name, weight in sorted(trainable(adapt(**arguments)).items()) if "lora_A" in name]


def differ(ours: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


ADAPTER: dict[str, Row] = {
    "model": Row(
        lambda: adapted(adapt()) >= {"0.q_proj", "1.down_proj"}, {"model": torch.nn.ReLU()}, "ReLU"
    ),
    "r": Row(lambda: layer_of(adapt(r=3)).mlp.up_proj.r["default"] == 3, {"r": True}, "get_peft_model: r"),
    "target_modules": Row(
        lambda: adapted(adapt(target_modules=("q_proj",))) == {"0.q_proj", "1.q_proj"},
        {"target_modules": ["q_porj"]},
        "Did you mean 'q_proj'",
    ),
    "lora_alpha": Row(
        lambda: layer_of(adapt(lora_alpha=6)).mlp.up_proj.scaling["default"] == 1.5, {"lora_alpha": 0}, "lora_alpha"
    ),
    "lora_dropout": Row(
        lambda: layer_of(adapt(lora_dropout=0.5)).mlp.up_proj.lora_dropout["default"].p == 0.5,
        {"lora_dropout": 1.0},
        "lora_dropout",
    ),
    "bias": Row(
        lambda: any(name.endswith("bias") for name in trainable(adapt("qwen2", bias="all"))), {"bias": "some"}, "bias"
    ),
    "layers_to_transform": Row(
        lambda: {name[0] for name in adapted(adapt(layers_to_transform=[1]))} == {"1"},
        {"layers_to_transform": [2]},
        "the model has layers 0 to 1",
    ),
    "layers_pattern": Row(
        lambda: {name[0] for name in adapted(adapt(layers_to_transform=[1], layers_pattern="layers"))} == {"1"},
        {"layers_pattern": "layers"},
        "must also be specified",
    ),
    "finetune_last_n_layers": Row(
        lambda: {name[0] for name in adapted(adapt(finetune_last_n_layers=1))} == {"1"},
        {"finetune_last_n_layers": 3},
        "the model has 2 layers",
    ),
    "use_gradient_checkpointing": Row(
        lambda: facts_of(adapt(use_gradient_checkpointing=True)).checkpointing is True,
        {"use_gradient_checkpointing": "often"},
        "allowed are True, False",
    ),
    "random_state": Row(
        lambda: differ(starts_of(), starts_of(random_state=1)), {"random_state": -1}, "random_state"
    ),
    "max_seq_length": Row(
        None, {"max_seq_length": 1024}, "above the 512 tokens"
    ),
    "qat_scheme": Row(
        lambda: facts_of(adapt(qat_scheme="int8")).qat.name == "int8", {"qat_scheme": "int9"}, "Did you mean 'int8'"
    ),
    "use_rslora": Row(
        lambda: layer_of(adapt(use_rslora=True, lora_alpha=16)).mlp.up_proj.scaling["default"] == 8,
        {"use_rslora": "perhaps"},
        "use_rslora",
    ),
    "use_dora": Row(
        lambda: any("magnitude" in name for name in trainable(adapt(use_dora=True))), {"use_dora": 3}, "use_dora"
    ),
    "modules_to_save": Row(
        lambda: any("norm" in name for name in trainable(adapt(modules_to_save=["norm"]))),
        {"modules_to_save": ["lm_haed"]},
        "Did you mean 'lm_head'",
    ),
    "init_lora_weights": Row(
        lambda: differ(starts_of(), starts_of(init_lora_weights="gaussian")), {"init_lora_weights": "Gauss"}, "Gauss"
    ),
    "loftq_config": Row(
        lambda: differ(starts_of(), starts_of(loftq_config={"loftq_bits": 8})),
        {"loftq_config": {"loftq_bits": 3}},
        "loftq_bits=3 must be 2, 4 or 8",
    ),
    "init_data": Row(
        lambda saved: differ(starts_of(), from_rows(saved)),
        {"init_lora_weights": "eva"},
        "init_data",
    ),
    "target_parameters": Row(
        lambda: any("experts" in name for name in trainable(adapt("mixtral", target_parameters=EXPERTS))),
        {"target_parameters": ["mlp.exprts"]},
        "target_parameters",
    ),
    "task_type": Row(
        lambda: adapt(task_type="CAUSAL_LM").peft_config["default"].task_type == "CAUSAL_LM",
        {"task_type": "SEQ_CLS"},
        "is a model for CAUSAL_LM",
    ),
    # A text model has no vision layers: leaving them out is no mistake there.
    "finetune_vision_layers": Row(
        lambda: moved_by_filter("vision_layers"),
        {"model": tiny_vision.vision_model("gemma3"), **dict.fromkeys(FILTERS, False)},
        "finetune_",
    ),
    **{
        f"finetune_{part}": Row(lambda part=part: moved_by_filter(part), {f"finetune_{part}": value}, "finetune_")
        for part, value in (
            ("language_layers", False), ("attention_modules", False), ("mlp_modules", False), ("audio_layers", True),
        )
    },
    "temporary_location": Row(
        lambda tmp_path: spilled(tmp_path / "spill"), {"temporary_location": "x"}, "where fused layers put"
    ),
    "ensure_weight_tying": Row(
        lambda: tied(adapt("qwen3", modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
        {"ensure_weight_tying": True},
        "ensure_weight_tying=True keeps",
    ),
    "rank_pattern": Row(
        lambda: layer_of(adapt(rank_pattern={"up_proj": 2})).mlp.up_proj.r["default"] == 2,
        {"rank_pattern": {"up_porj": 2}},
        "Did you mean 'up_proj'",
    ),
    "alpha_pattern": Row(
        lambda: layer_of(adapt(alpha_pattern={"up_proj": 2.0})).mlp.up_proj.scaling["default"] == 0.5,
        {"alpha_pattern": {"up_porj": 2}},
        "Did you mean 'up_proj'",
    ),
    "exclude_modules": Row(
        lambda: "0.q_proj" not in adapted(adapt(exclude_modules=["q_proj"])),
        {"exclude_modules": ["q_porj"]},
        "Did you mean 'q_proj'",
    ),
    "unknown": Row(None, {"lora_aplha": 16}, "Did you mean 'lora_alpha'"),
}  # fmt: skip


EXPERTS = ["mlp.experts.down_proj"]


def from_rows(saved: Path) -> list[torch.Tensor]:
    rows = {"init_lora_weights": "eva", "init_data": [{"text": "the cat sat on a mat"}]}
    model = FastLanguageModel.get_peft_model(load(saved), r=4, use_gradient_checkpointing=False, **rows)
    return [weight for name, weight in sorted(trainable(model).items()) if "lora_A" in name]


def moved_by_filter(part: str) -> bool:
    """Whether a filter of multimodal models leaves out its layers, or is refused where the model has none of them."""
    if part == "audio_layers":
        with pytest.raises(TunesmithError, match="finetune_audio_layers"):
            FastVisionModel.get_peft_model(tiny_vision.vision_model("gemma3"), r=2, finetune_audio_layers=True)
        return True
    names = [
        set(trainable(FastVisionModel.get_peft_model(tiny_vision.vision_model("gemma3"), r=2, **off)))
        for off in ({}, {f"finetune_{part}": False})
    ]
    return names[1] < names[0]


def spilled(place: Path) -> bool:
    """Whether layer inputs go to ``place`` while a step is computed."""
    from tunesmith.engine.attention import use_document_attention
    from tunesmith.engine.install import install

    model = tiny.tiny_model("llama")
    use_document_attention(model)
    install(model)
    settings = {"use_gradient_checkpointing": "offload", "temporary_location": str(place)}
    FastLanguageModel.get_peft_model(model, r=4, **settings)(
        input_ids=torch.arange(9)[None], use_cache=False
    ).logits.sum().backward()
    return place.is_dir()


def tied(model: Any) -> bool:
    base = model.get_base_model()
    return base.get_input_embeddings().weight is base.get_output_embeddings().weight


def called(function: Callable[..., Any], **fixtures: Any) -> Any:
    """Call ``function`` with those of the fixtures that it asks for."""
    wanted = inspect.signature(function).parameters
    return function(**{name: value for name, value in fixtures.items() if name in wanted})


def test_every_argument_has_a_row() -> None:
    loading = inspect.signature(FastLanguageModel.from_pretrained).parameters
    assert set(loading) == {*LOADING, *ABSENT}
    adapter = inspect.signature(FastLanguageModel.get_peft_model).parameters
    assert set(adapter) == {*ADAPTER}


@pytest.mark.parametrize("name", [name for name, row in LOADING.items() if row.effect is not None])
def test_an_argument_of_loading_has_its_effect(
    name: str,
    saved: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[..., str],
) -> None:
    fixtures = {"saved": saved, "tmp_path": tmp_path, "caplog": caplog, "monkeypatch": monkeypatch, "told": told}
    assert called(LOADING[name].effect, **fixtures)


@pytest.mark.parametrize("name", LOADING)
def test_an_argument_of_loading_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    refused = {"model_name": str(saved), **LOADING[name].refused}
    if callable(refused["model_name"]):
        refused["model_name"] = refused["model_name"](tmp_path / "code", saved)
    with pytest.raises((TunesmithError, TypeError), match=LOADING[name].message):
        FastLanguageModel.from_pretrained(**refused)


@pytest.mark.parametrize("name", ABSENT)
def test_an_argument_that_needs_what_is_not_here_says_so(name: str, saved: Path) -> None:
    if torch.cuda.is_available() or find_spec("vllm") is not None:
        pytest.skip("a GPU or vLLM is here")
    arguments, message = ABSENT[name]
    with pytest.raises(TunesmithError, match=message):
        load(saved, **arguments)


@pytest.mark.parametrize("name", [name for name, row in ADAPTER.items() if row.effect is not None])
def test_an_argument_of_the_adapter_has_its_effect(name: str, saved: Path, tmp_path: Path) -> None:
    assert called(ADAPTER[name].effect, saved=saved, tmp_path=tmp_path)


@pytest.mark.parametrize("name", ADAPTER)
def test_an_argument_of_the_adapter_is_refused(name: str) -> None:
    with pytest.raises((TunesmithError, TypeError), match=ADAPTER[name].message):
        FastLanguageModel.get_peft_model(**{"model": tiny.tiny_model("llama"), **ADAPTER[name].refused})
