"""Merged models in NF4: rounded once, as bitsandbytes rounds, in folders that transformers reads in 4 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.export.support import adapt, disturb, loaded, logits

from tunesmith.core.errors import AdapterError, ModelError
from tunesmith.export import merge
from tunesmith.export.form import Form, form_of
from tunesmith.export.merge import merge_model
from tunesmith.export.report import ExportReport, _problem
from tunesmith.export.verify import Reference, compared
from tunesmith.export.weights import adapter_shares, merged_weights
from tunesmith.models.load import facts_of


def written(model: Any, folder: Path) -> Any:
    """Return what transformers reads of ``model`` written in NF4."""
    from transformers import AutoModelForCausalLM

    weights = merged_weights(model, adapter_shares(model, None))
    merge._write(model, folder, weights, form_of(model, "merged_4bit"), 20_000)
    again, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return again


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "mixtral", "gpt-oss"])
def test_transformers_reads_the_layers_in_four_bits(family: str, tmp_path: Path) -> None:
    import bitsandbytes

    model = disturb(adapt(tiny.tiny_model(family)))
    again = written(model, tmp_path)
    layers = [name for name, layer in again.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    assert {name.rpartition(".")[2] for name in layers} >= {"o_proj"} and "lm_head" not in layers
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert torch.isfinite(logits(again)).all()


def test_merged_weights_are_rounded_once(tmp_path: Path) -> None:
    import bitsandbytes.functional as functional

    model = disturb(adapt(tiny.tiny_model("llama")))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    whole = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
    stored = written(model, tmp_path).model
    again = stored.layers[0].mlp.up_proj.weight
    codes, _ = functional.quantize_4bit(whole.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(again.data, codes) and again.quant_state.dtype == torch.bfloat16
    assert torch.equal(stored.norm.weight, model.get_base_model().model.norm.weight.bfloat16())


@pytest.mark.usefixtures("exports_load_here")
def test_the_report_says_what_four_bits_cost(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(merge.MERGE_METHODS, "merged_4bit", 9.0)  # random weights lose more than a trained model's
    base, tokenizer = loaded(saved)
    model = disturb(adapt(base))
    report = model.save_pretrained_merged(tmp_path / "out", tokenizer, save_method="merged_4bit_forced")
    assert (report.method, report.dtype, report.route) == ("merged_4bit", "NF4", "base")
    assert report.comparison.kl > 1e-4 and report.moved > report.comparison.kl
    plain = sum(weight.nbytes for weight in base.parameters()) // 2
    assert 0 < report.size < plain
    again, _ = loaded(tmp_path / "out")
    assert facts_of(again).width == "4bit"


@pytest.mark.usefixtures("exports_load_here")
def test_what_was_rounded_before_the_training_is_not_rounded_again(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merge.MERGE_METHODS, "merged_4bit", 9.0)
    base, tokenizer = loaded(saved, load_in_4bit=True)
    model = disturb(adapt(base))
    report = merge_model(model, tmp_path / "out", tokenizer, method="merged_4bit")
    assert set(report.comparisons) == {"original"} and report.comparison.kept > 0.5
    monkeypatch.setattr(merge, "_originals", lambda _: {})
    with pytest.raises(AdapterError, match=r"'merged_4bit' would undo the training: .* Use 'lora', to be loaded with"):
        merge_model(model, tmp_path / "other", tokenizer, method="merged_4bit")


@pytest.mark.usefixtures("exports_load_here")
@pytest.mark.parametrize(
    ("loading", "adapter"),
    [({}, {"modules_to_save": ["embed_tokens", "lm_head"]}), ({"resize_model_vocab": 340}, {})],
    ids=str,
)
def test_weights_that_the_files_lack_do_not_hide_those_that_they_have(
    loading: dict[str, Any], adapter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merge.MERGE_METHODS, "merged_4bit", 9.0)
    tiny.save_model(tmp_path / "model", "qwen3")  # one tensor for embedding and head
    base, tokenizer = loaded(tmp_path / "model", load_in_4bit=True, **loading)
    report = merge_model(disturb(adapt(base, **adapter)), tmp_path / "out", tokenizer, method="merged_4bit")
    assert set(report.comparisons) == {"original"}


def test_a_training_that_rounding_has_undone_is_caught(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    base, own, noise = (np.log(draw.dirichlet(np.ones(50), size=40)).astype(np.float32) for _ in range(3))
    probe = np.arange(40)
    reference = Reference((probe,), (own,), (), (), None, (base,), "float32")

    def judged(logprobs: np.ndarray) -> tuple[float | None, str | None]:
        found = replace(compared(reference, {"logprobs-0": logprobs}, "transformers"), kl=0.5)
        report = ExportReport(tmp_path, "merged_4bit", "base", 1, "NF4", 1.0, {"base": found}, reference.moved)
        return found.kept, _problem(report, 1.0)

    assert judged(own) == (1.0, None)
    kept, reason = judged(base)
    assert kept == 0 and reason == "only 0% of what the training changed is left"
    kept, reason = judged(own + 0.3 * (noise - noise.mean()))
    assert kept == pytest.approx(1, abs=0.2) and reason is None
    reference = replace(reference, base=(own + 1e-3 * (base - own),))  # too little was changed to tell
    assert judged(base)[1] is None


def test_sizes_are_known_beforehand() -> None:
    model = tiny.tiny_model("llama")
    form = form_of(model, "merged_4bit")
    weights = list(merged_weights(model, {}))
    needed = sum(form.bytes_of(weight) for weight in weights)
    stored = sum(tensor.nbytes for weight in weights for tensor in form.stored(weight).values())
    assert needed == pytest.approx(stored, rel=0.5)
    assert sum(Form(torch.float32).bytes_of(weight) for weight in weights) == sum(
        parameter.nbytes for parameter in model.parameters()
    )


def test_a_model_without_linear_layers_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=0, n_head=2))
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no linear layer that can be 4 bits"):
        form_of(model, "merged_4bit")
