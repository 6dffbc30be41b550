"""Bytes by part: what the estimate says the engine makes is what it makes."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.core.errors import SettingsError
from tunesmith.core.memory import available_bytes, parse_bytes, peak_bytes, resident_bytes
from tunesmith.engine.attention import use_document_attention
from tunesmith.engine.install import engine_of, install
from tunesmith.engine.policies import Policy
from tunesmith.memory import MemoryShape, PartShape, Setting, shape_of
from tunesmith.memory.estimate import LIBRARIES_BYTES, estimate, kept_bytes, transformers_peak

POLICIES = list(Policy)


def fused(family: str = "llama", rank: int = 4) -> Any:
    model = tiny.tiny_model(family)
    use_document_attention(model)
    install(model)
    return FastLanguageModel.get_peft_model(model, r=rank, use_gradient_checkpointing=False)


def plain_shape(**changes: Any) -> MemoryShape:
    return shape_of(fused()) if not changes else MemoryShape(**{**_fields(shape_of(fused())), **changes})


def _fields(shape: MemoryShape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in MemoryShape.__dataclass_fields__}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("policy", POLICIES)
def test_scratch_is_what_the_engine_holds(family: str, policy: Policy) -> None:
    model = fused(family)
    engine = engine_of(model)
    assert engine is not None
    engine.set_policy(policy)
    engine.scratch.clear()  # of the few tokens on which the layers were tried
    tokens = 40
    with engine.batch((tokens,), torch.arange(tokens)):
        model(input_ids=torch.arange(tokens)[None], use_cache=False).logits.sum().backward()
    shape = shape_of(model)
    found = estimate(shape, PartShape((tokens,), tokens), Setting((policy,) * shape.count))
    held = engine.scratch.nbytes()
    assert held <= found.parts["scratch"] * 1.02
    assert found.parts["scratch"] <= held * 1.25


@pytest.mark.parametrize("policy", [Policy.NONE, Policy.SEL_MLP, Policy.SEL_MIN, Policy.FULL])
def test_kept_bytes_are_what_autograd_saves(policy: Policy) -> None:
    model = fused()
    engine = engine_of(model)
    assert engine is not None
    engine.set_policy(policy)
    saved: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 2 and x.untyped_storage().data_ptr() not in weights:
            saved[x.data_ptr()] = x.nbytes
        return x

    tokens = 48
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), engine.batch((tokens,), None):
        hidden = (
            model.get_base_model()
            .get_decoder()(input_ids=torch.arange(tokens)[None], use_cache=False)
            .last_hidden_state
        )
    hidden.sum().backward()
    shape = shape_of(model)
    predicted = kept_bytes(shape, PartShape((tokens,), tokens), (policy,) * shape.count)
    # Rotary tables and the hidden states at the beginning are nobody's to save, and are there all the same.
    others = tokens * (2 * shape.head_dim + shape.hidden) * 4
    assert sum(saved.values()) == predicted - others


def test_the_shape_of_a_model_is_the_same_without_values() -> None:
    model = fused(rank=3)
    shape = shape_of(model)
    with torch.device("meta"):
        empty = type(model.get_base_model())(model.get_base_model().config)
    use_document_attention(empty)
    install(empty)
    empty = FastLanguageModel.get_peft_model(empty, r=3, use_gradient_checkpointing=False)
    assert shape_of(empty, kind="cpu") == shape
    assert shape.ranks == ((9, 3, 6, 3),) * 2
    assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.base_bytes == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert (shape.ffn, shape.vocabulary, shape.hidden) == (56, tiny.VOCABULARY, 32)


def test_every_part_counts_once() -> None:
    shape = plain_shape()
    found = estimate(shape, PartShape((64, 64), 100), Setting((Policy.NONE,) * 2))
    assert found.step == sum(found.parts.values()) and found.peak >= found.step
    assert found.parts["libraries"] >= LIBRARIES_BYTES
    assert found.parts["optimizer"] == 8 * shape.trained and found.parts["gradients"] == 4 * shape.trained
    measured = estimate(shape, PartShape((64, 64), 100), Setting((Policy.NONE,) * 2), present=2**30, peak_so_far=2**33)
    assert measured.parts["base"] == found.parts["base"] and measured.peak == 2**33
    assert sum(measured.parts[name] for name in ("libraries", "base", "adapter")) >= 2**30


def test_kernels_and_a_compiler_are_counted_where_there_are_any() -> None:
    def libraries(lanes: int = 1, **changes: Any) -> int:
        found = estimate(plain_shape(**changes), PartShape((64,), 64), Setting((Policy.FULL,) * 2, lanes=lanes))
        return found.parts.get("libraries", 0)  # a part of nothing is left out

    plain, fused_layers = libraries(), libraries(itemsize=2)
    assert 100 < (fused_layers - plain) / 2**20 < 120
    assert libraries(itemsize=2, layers=()) > fused_layers + 2**25
    # Heaps of lanes have holes, and more of them between kernels that stay.
    assert libraries(2) == plain + 2**26 and libraries(2, itemsize=2) == fused_layers + 5 * 2**25
    assert libraries(itemsize=2, kind="cuda") < plain
    assert libraries(compiles=True) > plain + 2**28


def test_lanes_hold_gradients_in_the_dtype_of_what_trains() -> None:
    def layer(lanes: int, gradient_bytes: int) -> int:
        shape = plain_shape(layers=(), gradient_bytes=gradient_bytes)
        return estimate(shape, PartShape((64,), 1), Setting((Policy.FULL,) * 2, lanes=lanes)).parts["layer"]

    assert layer(2, 2**30) - layer(1, 2**30) == 2 * 2**30
    assert layer(2, 2**31) - layer(1, 2**31) == 2 * 2**31


def test_a_head_that_trains_needs_room_for_the_gradient_of_its_weight() -> None:
    model = fused()
    assert not shape_of(model).head_trains
    model.get_input_embeddings().weight.requires_grad_(True)
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shape_of(model).head_trains == is_tied
    model.get_output_embeddings().weight.requires_grad_(True)
    assert shape_of(model).head_trains

    def step(**changes: Any) -> int:
        shape = plain_shape(vocabulary=2**16, **changes)
        return estimate(shape, PartShape((64,), 64), Setting((Policy.FULL,) * 2)).step

    for itemsize in (2, 4):
        sums = 2**16 * plain_shape().hidden * (4 + itemsize)
        assert step(head_trains=True, itemsize=itemsize) - step(itemsize=itemsize) == sums


def test_leaner_policies_keep_less_and_more_tokens_more() -> None:
    shape = plain_shape()

    def kept(policy: Policy, tokens: int = 64) -> int:
        return kept_bytes(shape, PartShape((tokens,), tokens), (policy,) * 2)

    ladder = [kept(policy) for policy in (Policy.NONE, Policy.SEL_MLP, Policy.SEL_MIN, Policy.FULL, Policy.OFFLOAD)]
    assert ladder == sorted(ladder, reverse=True) and len(set(ladder)) == 5
    assert kept(Policy.NONE, 128) > 1.9 * kept(Policy.NONE)
    few_rows = kept_bytes(shape, PartShape((64,), 4), (Policy.NONE,) * 2)
    assert few_rows < kept(Policy.NONE)


def test_the_full_logits_of_transformers_are_counted() -> None:
    shape = plain_shape(vocabulary=50_000)
    peak, activations = transformers_peak(shape, 4, 512)
    assert activations > 4 * 512 * 50_000 * 12
    assert peak > activations + shape.base_bytes


@pytest.mark.parametrize(
    ("text", "expected"), [("8GiB", 8 * 2**30), ("16 GB", 16 * 10**9), ("512mib", 512 * 2**20), ("1.5g", 1.5 * 10**9)]
)
def test_memory_is_read_with_its_unit(text: str, expected: float) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "8", "eight GiB", "-3GiB", "0GiB", "8 GiB free", "8PB"])
def test_memory_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SettingsError, match="write a number with a unit, for example 8GiB"):
        parse_bytes(text)


def test_the_process_knows_its_memory() -> None:
    # Straight from the system: an allocator may have as much lying about.
    with mmap.mmap(-1, 64 * 2**20) as block:
        before = resident_bytes()
        block.write(bytes(64 * 2**20))
        assert resident_bytes() >= before + 60 * 2**20
        assert peak_bytes() >= resident_bytes() - 2**22
    assert available_bytes() > 0


def test_a_width_that_the_config_leaves_open_is_four_times_the_hidden_one() -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])
    model = FastLanguageModel.get_peft_model(GPTNeoForCausalLM(config), use_gradient_checkpointing=False)
    assert config.intermediate_size is None
    assert shape_of(model).ffn == 128
