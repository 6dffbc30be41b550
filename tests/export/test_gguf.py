"""A GGUF file holds the live model: every tensor, value and token, in the order in which llama.cpp wants them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests import tiny
from tests.export.support import adapt, disturb, loaded
from tests.export.tokenizers_of import spaced

from tunesmith.core.errors import AdapterError, ExportError, HubError, OutputError, SettingsError
from tunesmith.core.versions import keep_softcap
from tunesmith.export.gguf import check, save, source, write
from tunesmith.export.gguf.methods import ALIASES, METHODS, gguf_methods
from tunesmith.export.gguf.save import save_gguf
from tunesmith.export.weights import adapter_shares, merged_weights

pytestmark = pytest.mark.usefixtures("without_llama")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
# llama.cpp's names of what stands in a layer, written down here and not taken from gguf's table.
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_PARTS = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
               "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def model_of(family: str, **changes: Any) -> Any:
    # llama.cpp has no window for mistral: one that is smaller than the probes would answer otherwise.
    model = tiny.tiny_model(family, **({"sliding_window": None} if family == "mistral" else {}), **changes)
    keep_softcap(model)
    return model


def expected(model: Any, family: str, shares: dict[str, float] | None = None) -> dict[str, np.ndarray]:
    """Return llama.cpp's name -> weight, arranged by hand; ``shares`` of adapters, None: the active one in full."""
    config, found = model.config, {}
    parts = {**PARTS, **(GEMMA_PARTS if family in ("gemma2", "gemma3") else {})}
    for weight in merged_weights(model, adapter_shares(model, shares)):
        module, _, kind = weight.name.rpartition(".")
        value = weight.make().detach().float().cpu().numpy()
        if module in ENDS:
            name = ENDS[module]
        else:
            _, _, layer, part = module.split(".", 3)
            name = f"blk.{layer}.{parts[part]}"
        if family in ("llama", "mistral") and name.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if name.endswith("q") else config.num_key_value_heads
            size = len(value) // heads
            order = [head * size + half * size // 2 + row
                     for head in range(heads) for row in range(size // 2) for half in (0, 1)]  # fmt: skip
            value = value[order]
        if family.startswith("gemma") and name.endswith("_norm"):
            value = value + 1
        found[f"{name}.{kind}"] = value
    return found


def stored(file: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape)[::-1])
        for tensor in gguf.GGUFReader(file).tensors
    }


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_stored_as_llama_cpp_wants_it(family: str, tmp_path: Path) -> None:
    model = disturb(adapt(model_of(family)))
    report = save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer(), methods="F32")
    (file,) = report.files
    assert file.path == tmp_path / "out" / "out.F32.gguf"
    wanted, found = expected(model, family), stored(file.path)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], value) for name, value in wanted.items())
    if family != "gemma":  # transformers reads no gemma from GGUF; llama.cpp runs it in test_gguf_llama.py
        assert file.trial.comparison.kl <= 1e-7 and file.trial.comparison.runtime == "transformers (GGUF)"
    said, config = fields(file.path), model.config
    arch = said["general.architecture"]
    assert said[f"{arch}.attention.head_count_kv"] == config.num_key_value_heads == 2
    assert said[f"{arch}.attention.key_length"] == 8 and said[f"{arch}.block_count"] == 2
    assert said[f"{arch}.rope.freq_base"] == (1e6 if family == "gemma3" else 1e4)
    if family == "gemma2":
        assert (said["gemma2.attn_logit_softcapping"], said["gemma2.final_logit_softcapping"]) == (5.0, 3.0)
    if family in ("gemma2", "gemma3"):
        assert said[f"{arch}.attention.sliding_window"] == 5
    if family == "gemma3":
        assert said["gemma3.attention.sliding_window_pattern"] == [True, False]
        assert said["gemma3.rope.freq_base_swa"] == 1e4


def test_each_method_stores_what_it_says_and_the_report_tells_it(tmp_path: Path) -> None:
    model, tokenizer = model_of("qwen3"), tiny.tiny_tokenizer()
    native = [method.name for method in METHODS.values() if method.is_native]
    report = save_gguf(model, tmp_path / "out", tokenizer, methods=native)
    wanted = expected(model, "qwen3")
    # Rows of down_proj have 56 values, which is no multiple of 32.
    assert report.files[native.index("q5_1")].stored.kinds == {"Q5_1": 12, "F32": 9, "F16": 2, "Q8_0": 1}
    for file in report.files:
        found = stored(file.path)
        errors = [np.linalg.norm(found[name] - value) / np.linalg.norm(value) for name, value in wanted.items()]
        assert max(errors) == pytest.approx(max(file.stored.error.values()), rel=1e-3)
        assert max(errors) < {"f32": 1e-9, "f16": 1e-3, "bf16": 3e-3, "q8_0": 0.01}.get(file.method, 0.12)
    sizes = {file.method: file.size for file in report.files}
    assert sizes["f32"] > sizes["f16"] == sizes["bf16"] > sizes["q8_0"] > sizes["q5_1"] > sizes["q4_0"]
    written = json.loads((tmp_path / "out" / "export_report.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(report.record()))
    assert [file["file"] for file in written["files"]] == [f"out.{name.upper()}.gguf" for name in native]
    assert (
        (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./out.F32.gguf\n# FROM ./out.F16")
    )


@pytest.mark.parametrize(
    "kind",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_every_kind_of_adapter_is_merged(kind: dict[str, Any], tmp_path: Path) -> None:
    model = disturb(adapt(tiny.tiny_model("qwen2", tie_word_embeddings=True), **kind))
    report = save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer(), methods="f32")
    assert report.files[0].trial.comparison.kl <= 1e-7
    assert ("output.weight" in stored(report.files[0].path)) == ("lm_head" in (kind.get("modules_to_save") or ()))


def test_a_quantized_base_is_written_as_what_it_stands_for(saved: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded(saved, load_in_4bit=True)
    model = disturb(adapt(base))
    (file,) = model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f32").files
    assert file.trial.comparison.kl <= 1e-6
    assert all(np.array_equal(stored(file.path)[name], value) for name, value in expected(model, "llama").items())


def test_sixteen_bits_are_not_quantized_in_their_own_kind() -> None:
    assert [method.name for method in gguf_methods("not_quantized", dtype="bfloat16")] == ["bf16"]
    assert [method.name for method in gguf_methods("Not_Quantized", dtype="float32")] == ["f16"]
    assert [method.name for method in gguf_methods(["Q8_0", "fast_quantized", "QUANTIZED"], dtype="float32")] == [
        "q8_0", "q4_k_m"]  # fmt: skip
    assert set(ALIASES.values()) <= METHODS.keys()
    assert [method.name for method in gguf_methods(("iq2_xs",), dtype="float32", imatrix=True)] == ["iq2_xs"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"quantization_method": "q4_k_n"}, r"quantization_method='q4_k_n': use f32, .*Did you mean 'q4_"),
        ({"quantization_method": []}, "quantization_method is empty"),
        ({"quantization_method": 8}, "quantization_method=.*8.*: a name or a list of names is needed"),
        ({"quantization_method": ["q8_0", None]}, "a name or a list of names is needed, such as 'q8_0'"),
        ({"save_method": 1}, "save_method=1: leave it out, or use 'lora'"),
        ({"quantization_method": ["q8_0", "iq1_s"]}, "'iq1_s' needs an importance matrix: give imatrix_file"),
        ({"first_conversion": "f16"}, "first_conversion is for K- and I-quants"),
        ({"first_conversion": "q8_0", "quantization_method": "q4_k_m"}, "first_conversion='q8_0': use f32, bf16, f16"),
        ({"imatrix_file": "nowhere.gguf"}, "imatrix_file is for K- and I-quants"),
        ({"imatrix_file": "nowhere.gguf", "quantization_method": "q4_k_m"}, "imatrix_file='nowhere.gguf' is not there"),
        ({"imatrix_file": __file__, "quantization_method": "q4_k_m"}, "is no importance matrix in GGUF"),
        ({"save_method": "merged_16bit"}, "save_method='merged_16bit': leave it out, or use 'lora'"),
        ({"save_method": "lora", "imatrix_file": "a"}, "imatrix_file has no meaning for save_method='lora'"),
        ({"save_method": "lora", "quantization_method": ["f16", "f32"]}, "writes one file"),
        ({"save_method": "lora", "quantization_method": "q8_0"}, "a LoRA is stored as f32, f16, bf16"),
    ],
)
def test_arguments_without_effect_or_meaning_are_refused(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    from tunesmith.export.methods import with_exports

    model = with_exports(adapt(tiny.tiny_model("llama")))
    with pytest.raises(SettingsError, match=message):
        model.save_pretrained_gguf(tmp_path / "out", tiny.tiny_tokenizer(), **asked)
    assert not list(tmp_path.iterdir())


def test_what_stands_in_the_way_is_said_before_anything_is_written(tmp_path: Path) -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer()
    with pytest.raises(ExportError, match=r"q4_k_m is made by llama.cpp. llama-cpp-python is not installed:"):
        save_gguf(model, tmp_path / "out", tokenizer, methods="q4_k_m")
    with pytest.raises(ExportError, match="holds the tokenizer too"):
        save_gguf(model, tmp_path / "out", None)
    with pytest.raises(ExportError, match=r"mixtral models are not written as GGUF. Supported are llama, mis"):
        save_gguf(tiny.tiny_model("mixtral"), tmp_path / "out", tokenizer)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").touch()
    with pytest.raises(OutputError, match="is there already"):
        save_gguf(model, tmp_path, tokenizer)


def test_the_hub_is_asked_first_and_a_gguf_method_is_pointed_to_its_place(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(saved)
    with pytest.raises(HubError, match="out cannot be uploaded: HF_HUB_OFFLINE"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, push_to_hub=True)
    with pytest.raises(SettingsError, match="token and private are for uploads"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, token="secret")
    with pytest.raises(SettingsError, match="save_pretrained_gguf writes that"):
        model.save_pretrained_merged(tmp_path / "out", tokenizer, "q4_k_m")
    with pytest.raises(SettingsError, match="save_method=16: one name is needed"):
        model.save_pretrained_merged(tmp_path / "out", tokenizer, 16)


def test_none_is_the_default_method(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(saved)
    with pytest.raises(HubError, match="a cannot be uploaded: HF_HUB_OFFLINE"):
        model.save_pretrained_merged(tmp_path / "a", tokenizer, None, push_to_hub=True, maximum_memory_usage=0.75)
    report = model.save_pretrained_gguf(tmp_path / "b", tokenizer, None, maximum_memory_usage=0.85)
    assert [file.method for file in report.files] == ["q8_0"]


def test_weights_trained_in_few_bits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model("llama")
    facts = source.facts_of(model)
    facts.trained_in = "8bit"
    monkeypatch.setattr(source, "facts_of", lambda _: facts)
    with pytest.raises(AdapterError, match="were trained in 8bit"):
        save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "computes llama with silu, and this model has gelu"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "scales the attention of this gemma2 by 8"),
        ("gemma2", {"tie_word_embeddings": False}, "no place for the weight lm_head.weight in gemma2"),
        ("gemma3", {"use_bidirectional_attention": True}, "causal attention"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
         "'dynamic' of this qwen2"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 256}}, "'llama3'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "truncate": False,
                                       "original_max_position_embeddings": 256}}, "truncate: false"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        save_gguf(tiny.tiny_model(family, **changes), tmp_path / "out", tiny.tiny_tokenizer())
    assert not list(tmp_path.iterdir())


_TRAINED = {"original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, **_TRAINED},
         {"type": "yarn", "factor": 2.0, "original_context_length": 256, "yarn_beta_fast": 16.0,
          "yarn_beta_slow": 1.0}),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5, **_TRAINED},
         {"type": "yarn", "factor": 2.0, "original_context_length": 256, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0,
          "attn_factor": pytest.approx(1.5 / (1 + 0.1 * np.log(2)))}),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_TRAINED}, {}),
    ],
)  # fmt: skip
def test_a_stretched_window_is_told(scheme: dict[str, Any], said: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", rope_parameters={"rope_theta": 1e4, **scheme})
    (file,) = save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer(), methods="f32").files
    start = "llama.rope.scaling."
    found = {name.removeprefix(start): value for name, value in fields(file.path).items() if name.startswith(start)}
    assert found == said
    if scheme["rope_type"] == "llama3":
        factors = stored(file.path)["rope_freqs.weight"]
        plain = 1e4 ** -(np.arange(4) / 4)
        assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
        assert factors.max() == pytest.approx(8.0) and factors.min() == 1.0


def test_both_factors_of_longrope_are_written(tmp_path: Path) -> None:
    scheme = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
              "long_factor": [1.0, 2.0, 3.0, 4.0], "partial_rotary_factor": 1.0, **_TRAINED}  # fmt: skip
    model = tiny.tiny_model("phi3", rope_parameters=scheme, original_max_position_embeddings=256)
    (file,) = save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer(), methods="f32").files
    found = stored(file.path)
    assert found["rope_factors_short.weight"].tolist() == pytest.approx([1.0, 1.1, 1.2, 1.3])
    assert found["rope_factors_long.weight"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert fields(file.path)["phi3.rope.scaling.attn_factor"] == pytest.approx(model.model.rotary_emb.attention_scaling)


def test_a_window_that_llama_cpp_does_not_know_bounds_the_context(tmp_path: Path) -> None:
    model = tiny.tiny_model("mistral", sliding_window=128)
    report = save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer(), methods="f32")
    assert fields(report.files[0].path)["llama.context_length"] == 128
    assert "beyond 128 tokens it would answer otherwise" in report.notes[0]


def broken(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let one tensor of the next file be written otherwise."""
    quantize = write.gguf.quants.quantize
    seen = {"count": 0}

    def altered(values: np.ndarray, kind: Any) -> np.ndarray:
        seen["count"] += 1
        return quantize(values[::-1].copy() if seen["count"] == int(name) else values, kind)

    monkeypatch.setattr(write.gguf.quants, "quantize", altered)


@pytest.mark.parametrize("method", ["f32", "q4_0"])
def test_one_altered_tensor_is_caught(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "4")
    with pytest.raises(ExportError, match=r"in out\.\w+\.gguf \(\w+\) is off by .* It is kept as .*out-failed"):
        save_gguf(model_of("qwen3"), tmp_path / "out", tiny.tiny_tokenizer(), methods=method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-failed"]
    assert list((tmp_path / "out-failed").glob("*.gguf"))


def test_an_altered_tensor_that_rereading_let_pass_is_caught_by_what_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, "4")
    monkeypatch.setattr(save, "reread", lambda *_: check.Reread({}, {}))
    with pytest.raises(ExportError, match=r"answers in transformers \(GGUF\) otherwise than the model: KL divergence"):
        save_gguf(model_of("qwen3"), tmp_path / "out", tiny.tiny_tokenizer(), methods="f32")


@pytest.mark.parametrize(
    ("method", "key"),
    [("add_chat_template", "chat_template"), ("add_add_bos_token", "add_bos_token"), ("add_token_types", "token_type")],
)
def test_another_template_or_tokenizer_is_caught(
    method: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(gguf.GGUFWriter, method)
    wrong = {"add_chat_template": "{{ messages }}", "add_add_bos_token": True, "add_token_types": [1] * tiny.VOCABULARY}
    monkeypatch.setattr(gguf.GGUFWriter, method, lambda self, _: whole(self, wrong[method]))
    with pytest.raises(ExportError, match=f"out.F32.gguf has another .*{key} than the model"):
        save_gguf(tiny.tiny_model("llama"), tmp_path / "out", tiny.tiny_tokenizer(), methods="f32")


def test_an_adapter_that_was_not_merged_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = disturb(adapt(tiny.tiny_model("llama")))
    whole = save._write_native

    def forgetful(source: Any, path: Path, name: str, method: Any) -> None:
        kept = [layer for layer in model.modules() if hasattr(layer, "lora_B") and layer.lora_B]
        weights = [layer.lora_B["default"].weight.data.clone() for layer in kept]
        for layer in kept:
            layer.lora_B["default"].weight.data.zero_()
        whole(source, path, name, method)
        for layer, weight in zip(kept, weights, strict=True):
            layer.lora_B["default"].weight.data.copy_(weight)

    monkeypatch.setattr(save, "_write_native", forgetful)
    with pytest.raises(ExportError, match="is off by"):
        save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer(), methods="f32")


def test_values_that_f16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 70000.0
    with pytest.raises(ExportError, match=r"blk.0.ffn_up.weight has values above 65504, and f16 cannot hold them"):
        save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer(), methods="f16")


def test_an_export_changes_nothing_of_the_model(tmp_path: Path) -> None:
    model = disturb(adapt(model_of("gemma2")))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer(), methods=["q8_0", "f16"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_sentencepiece_tokenizer_is_written_with_its_scores(tmp_path: Path) -> None:
    tokenizer = spaced()
    (file,) = save_gguf(tiny.tiny_model("llama"), tmp_path / "out", tokenizer, methods="f32").files
    said = fields(file.path)
    assert said["tokenizer.ggml.model"] == "llama" and said["tokenizer.ggml.add_space_prefix"]
    assert said["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def test_a_stretched_window_of_layers_that_see_little_is_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("gemma3")
    near = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model.config.rope_parameters = {**model.config.rope_parameters, "sliding_attention": near}
    with pytest.raises(ExportError, match="layers with a window have a stretched rotary embedding"):
        save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer())


def test_what_fails_again_takes_the_place_of_what_failed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out-failed").mkdir()
    (tmp_path / "out-failed" / "old.gguf").write_bytes(b"")
    broken(monkeypatch, "4")
    with pytest.raises(ExportError, match=r"It is kept as .*out-failed"):
        save_gguf(model_of("qwen3"), tmp_path / "out", tiny.tiny_tokenizer(), methods="f32")
    assert [path.name for path in (tmp_path / "out-failed").glob("*.gguf")] == ["out.F32.gguf"]
