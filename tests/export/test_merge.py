"""A merged model answers as base and adapter did, and an export that does not is caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.export.support import adapt, disturb, loaded, logits

from tunesmith.core.errors import AdapterError, ExportError, OutputError
from tunesmith.export import merge
from tunesmith.export.form import Form
from tunesmith.export.merge import merge_model
from tunesmith.export.verify import Comparison, Reference, compare, compared, reference_of
from tunesmith.export.weights import _merging, adapter_shares, merged_weights, mixed
from tunesmith.models.load import facts_of


def written(model: Any, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    """Return the plain model that is read from what is written of ``model``."""
    from transformers import AutoModelForCausalLM

    folder.mkdir(exist_ok=True)
    weights = merged_weights(model, adapter_shares(model, how.pop("adapters", None)))
    merge._write(model, folder, weights, Form(dtype), how.pop("shard_bytes", 10**9))
    again, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return again


KINDS: tuple[dict[str, Any], ...] = (
    {"use_rslora": True},
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"bias": "all"},
    {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
    {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["norm"]},
)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_answers_as_before(family: str, tmp_path: Path) -> None:
    model = disturb(adapt(tiny.tiny_model(family)))
    torch.testing.assert_close(logits(written(model, tmp_path)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_adapter_answers_as_before(kind: dict[str, Any], tmp_path: Path) -> None:
    tied = tiny.tiny_model("qwen2", tie_word_embeddings=True)
    model = disturb(adapt(tied, **kind))
    again = written(model, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert again.config.tie_word_embeddings == ("lm_head" not in (kind.get("modules_to_save") or ()))


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, {}) for family in tiny.FAMILIES), *(("qwen2", kind) for kind in KINDS)], ids=str
)
def test_in_sixteen_bits_answers_stay_near(family: str, kind: dict[str, Any], tmp_path: Path) -> None:
    shape = {"tie_word_embeddings": True} if kind else {}
    model = disturb(adapt(tiny.tiny_model(family, **shape).bfloat16(), **kind))
    again = written(model, tmp_path, torch.bfloat16)
    # Both computed in float32: what differs is that the sum of base and adapter is rounded once.
    live, merged = (logits(one).log_softmax(-1) for one in (model.float(), again))
    divergence = (live.exp() * (live - merged)).sum(-1).mean()
    # A random router is near a tie for some tokens, which rounding sends to another expert.
    assert 0 < divergence <= (1e-2 if family == "qwen3-moe" else 1e-3)


def test_sixteen_bits_are_rounded_once(tmp_path: Path) -> None:
    model = disturb(adapt(tiny.tiny_model("llama").bfloat16()))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    whole = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    again = written(model, tmp_path, torch.bfloat16)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight.bfloat16(), whole.bfloat16())


def test_shards_hold_every_weight_once(tmp_path: Path) -> None:
    model = disturb(adapt(tiny.tiny_model("llama")))
    again = written(model, tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert max((tmp_path / name).stat().st_size for name in files) < 60_000
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_several_adapters_are_added_by_their_shares(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = adapt(tiny.tiny_model("llama"))
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    wanted = layer.base_layer.weight + 0.25 * layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("other")
    again = written(model, tmp_path, adapters={"default": 0.25, "other": 0.5})
    torch.testing.assert_close(again.model.layers[0].self_attn.q_proj.weight, wanted)
    with pytest.raises(AdapterError, match=r"adapter 'third' is not on this model. There are: default, other"):
        adapter_shares(model, {"third": 1.0})


def test_an_original_is_merged_where_the_adapter_is() -> None:
    """A file is read to the CPU, the adapter may be on a GPU: here on the meta device."""
    layer = adapt(tiny.tiny_model("llama")).get_base_model().model.layers[0].self_attn.q_proj.to("meta")
    made = _merging(layer, {"default": 1.0}, lambda: torch.zeros(32, 32, dtype=torch.bfloat16))()
    assert (made.device.type, made.dtype) == ("meta", torch.float32)


def test_a_merge_changes_nothing_of_the_model(tmp_path: Path) -> None:
    model = disturb(adapt(tiny.tiny_model("llama")))
    before, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    written(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_export_is_loaded_elsewhere_and_compared(saved: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded(saved)
    model = disturb(adapt(base))
    report = merge_model(model, tmp_path / "out", tokenizer, method="merged_32bit", prompts=["the cat sat on a mat"])
    found = report.comparison
    assert (report.route, found.runtime, found.top1) == ("base", "transformers", 1.0)
    assert (found.texts, found.equal_texts, found.tokenizer) == (3, 3, "equal")
    assert found.difference <= 1e-4 and found.kl <= 1e-6
    assert found.perplexity == pytest.approx(found.live_perplexity, rel=1e-4)
    assert json.loads((tmp_path / "out" / "export_report.json").read_text()) == report.record()
    again, own = loaded(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert own.chat_template == tokenizer.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(OutputError, match="out is there already"):
        merge_model(model, tmp_path / "out", tokenizer)


@pytest.mark.usefixtures("exports_load_here")
def test_what_is_loaded_ends_where_the_template_does(saved: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded(saved)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    base.generation_config.eos_token_id = other = end + 5
    merge_model(disturb(adapt(base)), tmp_path / "out", tokenizer)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert written == sorted({end, other, tokenizer.eos_token_id})


@pytest.mark.usefixtures("exports_load_here")
def test_a_quantized_base_is_merged_by_the_nearer_route(saved: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded(saved, load_in_4bit=True)
    model = disturb(adapt(base))
    report = merge_model(model, tmp_path / "out", tokenizer, method="merged_32bit")
    assert set(report.comparisons) == {"dequantized", "original"} and report.route == "dequantized"
    assert report.comparisons["original"].kl > 100 * report.comparison.kl
    again, _ = loaded(tmp_path / "out")
    assert facts_of(again).width is None
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rename_turns(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8").replace("<|im_end|>", "<|im_stop|>"), encoding="utf-8")


def swap_tokens(folder: Path) -> None:
    """Give two letters each other's ids."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["W"], vocabulary["Q"] = vocabulary["Q"], vocabulary["W"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


_LAYER = "model.layers.0.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight is another": (lambda folder: edit(folder, lambda found: found[_LAYER].mul_(1.5)), "KL divergence .*"),
    "a weight is no number": (
        lambda folder: edit(folder, lambda found: found[_LAYER].fill_(torch.nan)),
        "divergence inf",
    ),
    "the template is another": (rename_turns, "its tokenizer has another chat template"),
    "the tokens are others": (swap_tokens, "its tokenizer gives other ids to the same text"),
}


@pytest.mark.usefixtures("exports_load_here")
@pytest.mark.parametrize("case", BROKEN)
def test_an_export_that_answers_otherwise_is_kept_under_another_name(
    case: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = loaded(saved)
    model = disturb(adapt(base))
    whole, (spoil, reason) = merge.compare, BROKEN[case]

    def broken(reference: Reference, folder: Path, **how: Any) -> Comparison:
        spoil(folder)
        return whole(reference, folder, **how)

    monkeypatch.setattr(merge, "compare", broken)
    with pytest.raises(ExportError, match=rf"answers otherwise than the model: .*{reason}.* It is kept as .*failed"):
        merge_model(model, tmp_path / "out", tokenizer, method="merged_32bit")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out-failed" / "export_report.json").is_file()


def test_texts_that_part_at_a_near_tie_are_told_and_not_refused() -> None:
    likely = np.log(np.array([[0.5, 0.3, 0.2], [0.41, 0.39, 0.2]], dtype=np.float32))
    same = {"logprobs-0": likely, "text-0": np.array([0, 0])}
    reference = Reference((np.array([0, 1]),), (likely,), (np.array([0, 0]),), (likely,), None, None, "float32")
    found = compared(reference, same, "transformers")
    assert (found.texts, found.equal_texts, found.text_gap, found.kl) == (1, 1, None, 0)
    found = compared(reference, {**same, "text-0": np.array([0, 1])}, "transformers")
    assert (found.texts, found.equal_texts) == (1, 0)
    assert found.text_gap == pytest.approx(np.log(0.41 / 0.39), abs=1e-6)


@pytest.mark.usefixtures("exports_load_here")
def test_mixed_adapters_are_compared_as_they_are_mixed(saved: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    base, tokenizer = loaded(saved)
    model = disturb(adapt(base))
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False))
    before, trained = logits(model), {name: value.requires_grad for name, value in model.named_parameters()}
    shares = {"default": 0.25, "other": 0.5}
    report = model.save_pretrained_merged(tmp_path / "out", tokenizer, "merged_32bit", adapters=shares)
    assert report.comparison.kl < 1e-6 and report.moved > 1e-3
    assert model.active_adapters == ["default"] and torch.equal(logits(model), before)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == trained
    with mixed(model, shares):
        torch.testing.assert_close(logits(loaded(tmp_path / "out")[0]), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("exports_load_in_a_fork")
def test_an_export_that_cannot_be_loaded_says_why(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(saved)
    reference = reference_of(model, tokenizer)
    assert isinstance(reference, Reference) and len(reference.probes) == 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match=r"transformers cannot load what was exported: .*"):
        compare(reference, tmp_path / "empty")


@pytest.mark.parametrize("width", ["4bit", "8bit"])
def test_weights_that_were_trained_in_few_bits_are_saved_and_not_merged(
    width: str, saved: Path, tmp_path: Path
) -> None:
    model, _ = loaded(saved, full_finetuning=True, **{f"load_in_{width}": True})
    with pytest.raises(AdapterError, match=f"trained in {width[0]} bits, so there is nothing to merge"):
        merge_model(model, tmp_path / "out")


def test_what_no_plain_weight_can_hold_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(AdapterError, match="has lora_bias, which no plain weight can hold"):
        adapter_shares(get_peft_model(tiny.tiny_model("qwen2"), config), None)


def test_the_biases_of_a_quantized_base_are_written_too(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "qwen2")
    base, _ = loaded(tmp_path / "model", load_in_4bit=True)
    model = disturb(adapt(base))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.base_layer.bias.data.fill_(0.5)
    again = written(model, tmp_path / "out")
    assert torch.equal(again.model.layers[0].self_attn.q_proj.bias, layer.base_layer.bias)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_tied", [True, False])
def test_rows_of_tokens_that_peft_trained_are_merged(is_tied: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=[7, 14])
    model = disturb(get_peft_model(tiny.tiny_model("qwen2", tie_word_embeddings=is_tied), config))
    again = written(model, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert again.config.tie_word_embeddings == is_tied


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_an_adapter_that_parts_a_tied_head_is_refused_before_anything_is_written(
    targets: list[str], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    def model(**how: Any) -> Any:
        config = LoraConfig(r=2, target_modules=["q_proj", *targets], init_lora_weights=False, **how)
        return get_peft_model(tiny.tiny_model("qwen2", tie_word_embeddings=True), config)

    with pytest.raises(
        AdapterError, match="embedding and output head of this model are one tensor, which no export parts"
    ):
        adapter_shares(model(), None)
    whole = model(ensure_weight_tying=True)
    torch.testing.assert_close(logits(written(whole, tmp_path)), logits(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}], ids=str
)
def test_adapters_that_cannot_be_added_to_others_are_merged_alone(kind: dict[str, Any]) -> None:
    from peft import LoraConfig

    model = adapt(tiny.tiny_model("llama"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], **kind))
    with pytest.raises(AdapterError, match="DoRA or whole modules cannot be added to others"):
        adapter_shares(model, {"default": 0.5, "other": 0.5})
    assert adapter_shares(model, {"other": 1.0}) == {"other": 1.0}


def test_a_dora_is_merged_in_full_or_not_at_all() -> None:
    model = adapt(tiny.tiny_model("llama"), use_dora=True)
    with pytest.raises(AdapterError, match=r"adapter 'default' is a DoRA: it is merged in full, not by 0\.5"):
        adapter_shares(model, {"default": 0.5})


def test_an_export_with_another_vocabulary_is_named() -> None:
    own, other = (np.log(np.full((2, size), 1 / size, dtype=np.float32)) for size in (3, 4))
    reference = Reference((np.array([0, 1]),), (own,), (), (), None, None, "float32")
    with pytest.raises(ExportError, match="the export has 4 tokens in its vocabulary, the model 3"):
        compared(reference, {"logprobs-0": other}, "transformers")


def test_mixing_leaves_frozen_what_was_frozen() -> None:
    from peft import LoraConfig

    model = adapt(tiny.tiny_model("llama"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.requires_grad_(False)
    with mixed(model, {"default": 0.5, "other": 0.5}):
        pass
    assert not any(parameter.requires_grad for parameter in model.parameters())
