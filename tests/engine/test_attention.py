"""Document attention on a model that also generates, is saved, and lives beside other models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from tunesmith.core.errors import ModelError
from tunesmith.engine.attention import ATTENTION, use_document_attention

IMPLEMENTATION = {"gemma2": "eager", "gpt-oss": "eager"}


def pair(family: str) -> tuple[Any, Any]:
    """The same model twice: with document attention, and as transformers wrote it."""
    ours, own = tiny.tiny_model(family).eval(), tiny.tiny_model(family).eval()
    assert use_document_attention(ours) is None
    # SDPA knows neither softcap nor sinks.
    own.set_attn_implementation(IMPLEMENTATION.get(family, "sdpa"))
    return ours, own


def padded_batch() -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(tiny.VOCABULARY, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_what_it_does_not_compute_is_left_or_refused(family: str) -> None:
    both_ways = tiny.tiny_model(family, is_causal=False)
    assert "attends in both directions" in str(use_document_attention(both_ways))
    ours, _ = pair(family)
    ids = torch.arange(12)[None]
    with pytest.raises(ModelError, match="Load the model with attn_implementation='eager'"):
        ours(input_ids=ids, output_attentions=True)
    ours.config.is_causal = False
    with pytest.raises(ModelError, match="made to attend in both directions"):
        ours(input_ids=ids)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generation_equals_transformers_own(family: str) -> None:
    ours, own = pair(family)
    batch = padded_batch()
    wanted = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "output_logits": True,
              "return_dict_in_generate": True}  # fmt: skip
    mine, theirs = ours.generate(**batch, **wanted), own.generate(**batch, **wanted)
    assert torch.equal(mine.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(mine.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_padded_forward_equals_transformers_own(family: str) -> None:
    ours, own = pair(family)
    batch = padded_batch()
    read = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits[read], own(**batch).logits[read], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss"])
def test_a_batch_of_whole_rows_equals_transformers_own(family: str) -> None:
    ours, own = pair(family)
    ids = torch.arange(40).view(2, 20) * 7 % tiny.VOCABULARY
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, own(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_documents_are_cut_where_positions_restart(family: str) -> None:
    model, _ = pair(family)
    ids = torch.arange(20)[None] * 7 % tiny.VOCABULARY
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with torch.no_grad():
        joined = model(ids, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(ids[:, :12]).logits[0], model(ids[:, 12:]).logits[0]])
    torch.testing.assert_close(joined, alone, rtol=1e-4, atol=1e-4)


def test_positions_may_start_anywhere() -> None:
    model, own = pair("llama")
    ids, positions = torch.arange(6)[None] + 3, torch.arange(30, 36)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, position_ids=positions).logits, own(ids, position_ids=positions).logits, rtol=1e-4, atol=1e-4
        )


def test_a_document_need_not_start_at_zero() -> None:
    """Two windows cut from longer texts: the second begins where positions do not go on."""
    model, own = pair("llama")
    ids, positions = torch.arange(9)[None] + 3, torch.tensor([[30, 31, 32, 33, 34, 7, 8, 9, 10]])
    with torch.no_grad():
        joined = model(ids, position_ids=positions, use_cache=False).logits[0]
        alone = [own(ids[:, part], position_ids=positions[:, part]).logits[0] for part in (slice(5), slice(5, 9))]
    torch.testing.assert_close(joined, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_saved_model_does_not_name_our_attention(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = pair("llama")
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    assert "architectures" in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))


def test_two_models_of_a_process_are_independent() -> None:
    first, second = tiny.tiny_model("llama").eval(), tiny.tiny_model("llama").eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = second(ids).logits
        assert use_document_attention(first) is None
        assert second.config._attn_implementation == "sdpa"
        assert torch.equal(second(ids).logits, before)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("lfm2", "Lfm2ForCausalLM mixes in layers of kind conv"),
        ("mamba", "MambaForCausalLM does not call transformers' attention interface"),
    ],
)
def test_models_it_cannot_serve_keep_their_own(family: str, reason: str) -> None:
    model = tiny.tiny_model(family)
    before = model.config._attn_implementation
    assert use_document_attention(model) == reason
    assert model.config._attn_implementation == before


def test_attention_that_was_asked_for_is_left_alone() -> None:
    model = tiny.tiny_model("llama", attn_implementation="eager")
    assert use_document_attention(model) == "attn_implementation='eager' was chosen"
    assert model.config._attn_implementation == "eager"


def test_dropout_and_static_caches_run() -> None:
    """Paths that hand over to SDPA: attention dropout in training, and a cache longer than the prompt."""
    model = tiny.tiny_model("llama", attention_dropout=0.5).train()
    use_document_attention(model)
    ids = torch.arange(9)[None]
    assert not torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    ours, own = pair("llama")
    wanted = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(ours.generate(ids, **wanted), own.generate(ids, **wanted))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_attention_dropout_keeps_documents_apart(family: str) -> None:
    """In training mode too, no gradient goes from one document to another."""
    model = tiny.tiny_model(family, attention_dropout=0.5).train()
    assert use_document_attention(model) is None
    embedded = torch.randn(1, 12, model.config.hidden_size, requires_grad=True)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    hidden = model.get_decoder()(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
    hidden[0, 7:].square().sum().backward()
    assert embedded.grad is not None
    assert not embedded.grad[0, :7].any()
    assert embedded.grad[0, 7:].any()
