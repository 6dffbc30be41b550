from __future__ import annotations

from typing import Any

import pytest
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.adapters.targets import linear_names, resolve_targets
from tunesmith.core.errors import AdapterError

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_the_seven_projections_by_default(family: str) -> None:
    assert resolve_targets(tiny.tiny_model(family), None) == SEVEN


def test_fused_projections_are_not_forgotten() -> None:
    """PEFT's own default for phi-3 adapts o_proj and down_proj alone."""
    assert resolve_targets(tiny.tiny_model("phi3"), None) == ["o_proj", "down_proj", "qkv_proj", "gate_up_proj"]


@pytest.mark.parametrize("family", ["gpt-oss", "mixtral", "qwen3-moe"])
def test_models_of_experts_adapt_their_attention(family: str) -> None:
    assert resolve_targets(tiny.tiny_model(family), None) == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_models_without_usual_names_adapt_every_linear_layer() -> None:
    model = tiny.tiny_model("bloom")
    assert resolve_targets(model, None) == linear_names(model)
    # Two that mamba reads past their forward: PEFT refuses the one, and nothing would come of the other.
    model = tiny.tiny_model("mamba")
    assert linear_names(model) == ["in_proj", "x_proj", "dt_proj", "out_proj"]
    assert resolve_targets(model, None) == ["in_proj", "x_proj"]
    FastLanguageModel.get_peft_model(model)


_SIZE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize(
    ("family", "sizes", "names"),
    [
        ("Bert", _SIZE, ["query", "key", "value", "dense"]),
        ("ModernBert", _SIZE, ["Wqkv", "Wo", "Wi"]),
        ("MPNet", _SIZE, ["q", "k", "v", "o", "dense"]),
        ("DebertaV2", {**_SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
         ["query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj", "dense"]),
        ("Albert", {**_SIZE, "embedding_size": 16}, ["query", "key", "value", "dense", "ffn", "ffn_output"]),
        ("T5", _T5, ["q", "k", "v", "o", "wi", "wo"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_encoders_adapt_their_attention_whatever_its_names_and_the_head_are(
    family: str, sizes: dict[str, Any], names: list[str], head: str
) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}{head}")(config)
    assert resolve_targets(model, None) == names


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.HYBRIDS])
def test_all_linear_is_everything_but_the_head(family: str) -> None:
    model = tiny.tiny_model(family)
    names = resolve_targets(model, "all-linear")
    assert names == linear_names(model)
    assert "lm_head" not in names
    assert len(set(names)) == len(names) > 0


def test_names_are_taken_as_they_are() -> None:
    model = tiny.tiny_model("llama")
    assert resolve_targets(model, ["q_proj", "down_proj"]) == ["q_proj", "down_proj"]
    assert resolve_targets(model, "q_proj") == ["q_proj"]
    assert resolve_targets(model, ["layers.0.self_attn.q_proj"]) == ["layers.0.self_attn.q_proj"]
    assert resolve_targets(model, r".*layers\.1\..*_proj") == r".*layers\.1\..*_proj"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["q_porj"], "'q_porj' matched no layer of LlamaForCausalLM. .*: q_proj, .*Did you mean 'q_proj'.*all-linear"),
        (["q_proj", "qkv_proj"], "'qkv_proj' matched no layer"),
        ([], "target_modules is empty. Linear layers are: q_proj"),
        ("q_porj", "'q_porj' matched no layer .*must match the whole name.*Did you mean 'q_proj'"),
        (r"layers\.0\..*", "matched no layer"),
        ("(", "is no regular expression: "),
        ("", "target_modules is empty. Linear layers are: q_proj"),
        (["self_attn"], r"matches model.layers.0.self_attn \(LlamaAttention\), which is no layer but holds some"),
        (".*", r"matches the model itself \(LlamaForCausalLM\), which is no layer"),
    ],
)
def test_what_matches_nothing_is_refused(asked: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        resolve_targets(tiny.tiny_model("llama"), asked)


def test_a_model_without_linear_layers() -> None:
    import torch

    with pytest.raises(AdapterError, match="Embedding has no linear layers that LoRA could adapt"):
        resolve_targets(torch.nn.Embedding(3, 3), None)
