"""What is chosen for a budget, what is said when nothing fits, and that a choice can be repeated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.memory.test_estimate import plain_shape

from tunesmith.core.errors import SettingsError
from tunesmith.data.parts import share_documents
from tunesmith.engine.policies import Policy
from tunesmith.memory import TrainingPlan, Work, plan_training
from tunesmith.memory.estimate import LIBRARIES_BYTES, MemoryShape, transformers_peak
from tunesmith.memory.plan import UNSLOTH_SHARE, check_fits
from tunesmith.memory.words import describe_policies

GIB = 2**30


def large_shape(**changes: Any) -> MemoryShape:
    """A model of 8 billion parameters in bfloat16."""
    layer = replace(plain_shape().layers[0], heads=32, key_heads=8, head_dim=128)
    own: dict[str, Any] = {
        "hidden": 4096, "ffn": 14336, "vocabulary": 128256, "layers": (layer,) * 32, "count": 32,
        "ranks": ((48, 16, 32, 16),) * 32, "itemsize": 2, "base_bytes": 16 * GIB, "trained": 42_000_000,
        "trained_bytes": 168_000_000, "heads": 32, "key_heads": 8, "head_dim": 128, "kind": "cuda",
    }  # fmt: skip
    return MemoryShape(**{**own, **changes})


def work(length: int = 1000, batch: int = 4, count: int = 4) -> Work:
    return Work([[(length, length)] * batch] * count, whole=length * batch, padded=(batch, length))


def planned(
    mode: bool | str, memory: int | None = None, *, shape: MemoryShape | None = None, **of: Any
) -> TrainingPlan:
    return plan_training(shape or large_shape(), work(**of), mode=mode, memory=memory)


@pytest.mark.parametrize("memory", [80, 40, 24, 22, 20])
def test_auto_takes_the_fastest_that_fits(memory: int) -> None:
    plan = planned("auto", memory * GIB, length=2048, batch=4)
    assert plan.fits and plan.peak <= memory * GIB
    richer = planned("auto", 2 * memory * GIB, length=2048, batch=4)
    assert richer.peak >= plan.peak
    # One more layer that keeps more would not fit: nothing is left lying.
    if plan.policies != richer.policies:
        assert plan.peak > 0.8 * memory * GIB / 1.05


def test_with_much_memory_nothing_is_computed_again() -> None:
    assert planned("auto", 200 * GIB).policies == (Policy.NONE,) * 32
    assert planned("auto").part_tokens is None


@pytest.mark.parametrize(
    ("mode", "policy"),
    [(False, Policy.NONE), (True, Policy.FULL), ("selective", Policy.SEL_MIN), ("offload", Policy.OFFLOAD)],
)
def test_a_mode_that_was_asked_for_is_kept(mode: bool | str, policy: Policy) -> None:
    plan = planned(mode, 80 * GIB)
    assert plan.policies == (policy,) * 32 and plan.reason.endswith("was asked for")


@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_unsloth_stays_below_its_share_of_transformers(length: int) -> None:
    shape = large_shape(base_bytes=2 * GIB)
    plan = planned("unsloth", 300 * GIB, shape=shape, length=length)
    theirs, _ = transformers_peak(shape, 4, length)
    assert plan.peak <= UNSLOTH_SHARE * theirs == pytest.approx(plan.budget, rel=1e-6)
    # The fastest of these: with more memory it would not have computed anything again, or this is that already.
    assert plan.policies[0] is Policy.NONE or plan.peak > 0.9 * UNSLOTH_SHARE * theirs


def test_where_weights_are_nearly_all_unsloth_looks_at_the_rest() -> None:
    shape = large_shape()
    plan = planned("unsloth", 300 * GIB, shape=shape, length=512, batch=1)
    theirs, activations = transformers_peak(shape, 1, 512)
    assert plan.peak > UNSLOTH_SHARE * theirs and "the weights alone" in plan.reason
    assert sum(plan.parts[name] for name in ("kept", "scratch")) <= UNSLOTH_SHARE * activations


def test_unsloth_does_not_depend_on_what_this_process_holds() -> None:
    shape = replace(plain_shape(vocabulary=50_000), kind="cpu")
    plans = [
        plan_training(shape, work(), mode="unsloth", memory=20 * GIB, present=LIBRARIES_BYTES + held)
        for held in (2**26, 2**28)
    ]
    assert plans[0].policies == plans[1].policies and plans[0].part_tokens == plans[1].part_tokens
    assert plans[0].peak < plans[1].peak


def test_a_card_that_is_too_small_gets_smaller_parts_first() -> None:
    whole = planned(True, 80 * GIB, length=4096, batch=16)
    cut = planned(True, 22 * GIB, length=4096, batch=16)
    assert whole.part_tokens is None and cut.part_tokens is not None and cut.part_tokens >= 4096
    assert cut.peak <= 22 * GIB and cut.fits


@pytest.mark.parametrize(
    ("mode", "memory", "length", "said"),
    [
        (False, 24, 4096, "use_gradient_checkpointing='auto' fits"),
        (True, 28, 32768, "use_gradient_checkpointing='offload' fits"),
        ("auto", 19, 32768, "max_length="),
        ("auto", 10, 2048, "Take a smaller model"),
    ],
)
def test_the_cheapest_change_that_fits_is_named(mode: bool | str, memory: int, length: int, said: str) -> None:
    plan = planned(mode, memory * GIB, length=length, batch=1)
    assert not plan.fits and said in (plan.advice or ""), plan
    with pytest.raises(SettingsError, match="GiB at its peak and there are"):
        check_fits(replace(plan, least=plan.peak), memory * GIB)


def test_a_shorter_length_that_is_named_does_fit() -> None:
    plan = planned("auto", 19 * GIB, length=32768, batch=1)
    length = int((plan.advice or "").split("max_length=")[1].split(" ")[0])
    assert planned("auto", 19 * GIB, length=length, batch=1).fits
    assert not planned("auto", 19 * GIB, length=length + 256, batch=1).fits


def test_parts_on_a_cpu_hold_the_longest_document() -> None:
    shape = replace(plain_shape(), kind="cpu")
    for length in (100, 700, 3000):
        plan = plan_training(shape, work(length), mode=True, memory=8 * GIB)
        assert plan.part_tokens is not None and plan.part_tokens >= length
        assert plan.tokens <= max(plan.part_tokens, length)


def test_documents_that_cannot_be_cut_apart_stay_together() -> None:
    plan = plan_training(plain_shape(), work(), mode=True, memory=8 * GIB, splits=False)
    assert plan.part_tokens is None and plan.tokens == 4000


def test_the_largest_part_is_found() -> None:
    import random

    draw = random.Random(0)
    batches = [[(draw.randint(5, 600), 5) for _ in range(8)] for _ in range(200)]
    found = Work(batches).largest(1024)
    truth = max(
        sum(batch[index][0] for index in share)
        for batch in batches
        for share in share_documents([length for length, _ in batch], 1024)
    )
    assert found.tokens == truth


def test_a_plan_can_be_written_and_followed_again() -> None:
    import json

    plan = planned("auto", 40 * GIB, length=8192)
    record = json.loads(json.dumps(plan.record()))
    assert plan.restored(record) == plan
    other = planned("auto", 120 * GIB, length=8192)
    again = other.restored(record)
    assert (again.policies, again.part_tokens, again.peak) == (plan.policies, plan.part_tokens, plan.peak)


def test_policies_in_words() -> None:
    assert describe_policies([Policy.NONE] * 3) == "all layers keep everything"
    assert (
        describe_policies([Policy.FULL, Policy.FULL, Policy.NONE])
        == "2 layers compute everything again, 1 layer: keep everything"
    )


def test_lanes_cost_memory_and_are_left_out_where_it_is_short() -> None:
    shape, short = large_shape(kind="cpu", itemsize=4, base_bytes=2 * GIB), work(100)
    whole = plan_training(shape, short, mode=True, memory=200 * GIB)
    lanes = plan_training(shape, short, mode=True, memory=200 * GIB, lanes=2)
    assert (whole.lanes, lanes.lanes) == (1, 2) and lanes.peak > 1.01 * whole.peak
    assert lanes.together().endswith("in 2 lanes side by side") and "lanes" not in whole.together()
    tight = plan_training(shape, short, mode=True, memory=int(1.055 * whole.peak), lanes=2)
    assert tight.fits and tight.lanes == 1
    assert plan_training(shape, short, mode="offload", memory=200 * GIB, lanes=2).lanes == 1


@pytest.mark.parametrize("rows", [work(batch=1), work(length=4, batch=4)], ids=["one document", "short documents"])
def test_lanes_that_no_batch_would_use_cost_nothing(rows: Work) -> None:
    shape = large_shape(kind="cpu", itemsize=4, base_bytes=2 * GIB)
    one, two = (plan_training(shape, rows, mode=True, memory=200 * GIB, lanes=lanes) for lanes in (1, 2))
    assert one.peak == two.peak and two.lanes == 1


def test_a_run_that_is_continued_keeps_its_lanes() -> None:
    shape = large_shape(kind="cpu", itemsize=4, base_bytes=2 * GIB)
    one, two = (plan_training(shape, work(), mode=True, memory=200 * GIB, lanes=lanes) for lanes in (1, 2))
    assert two.restored(one.record()).lanes == 1 and one.restored(two.record()).lanes == 2
    older = {name: value for name, value in one.record().items() if name != "lanes"}
    assert two.restored(older).lanes == 1


def four_bits(**changes: Any) -> MemoryShape:
    """The same model in 4 bits: 0.4 GB a layer where it is written out."""
    entries = 4096 * (4096 + 4096 + 2 * 1024 + 3 * 14336)
    return large_shape(base_bytes=6 * GIB, written_out=2 * 4096 * 14336, quantized=entries, **changes)


def test_quantized_weights_stay_written_out_in_half_of_the_memory_that_is_left() -> None:
    shape = four_bits()
    layer = shape.quantized * shape.itemsize
    whole = planned("auto", 80 * GIB, shape=shape)
    assert whole.dense == 32 and whole.parts["dense"] == 32 * layer
    assert whole.describe() == "all layers keep everything, and the quantized weights of all layers written out"
    # With nothing left to write out in a step, its buffer is not needed.
    without = planned("auto", 80 * GIB, shape=replace(shape, quantized=0))
    assert without.parts["scratch"] - whole.parts["scratch"] == shape.written_out * shape.itemsize
    memory = int(1.05 * (without.peak + 9 * layer))
    some = planned("auto", memory, shape=shape)
    assert some.dense == 4 and some.peak == without.peak + 4 * layer
    assert "the quantized weights of 4 layers written out" in some.describe()


@pytest.mark.parametrize(("mode", "memory"), [(True, 200), ("selective", 200), ("auto", 14), (False, None)])
def test_none_stay_where_something_else_is_short_or_memory_is_not_known(mode: bool | str, memory: int | None) -> None:
    plan = planned(mode, None if memory is None else memory * GIB, shape=four_bits(), length=2048)
    assert plan.dense == 0 and "dense" not in plan.parts and "written out" not in plan.describe()


def test_none_stay_where_nothing_fits() -> None:
    plan = planned(False, GIB, shape=four_bits(), length=2048)
    assert plan.advice is not None and plan.dense == 0 and "dense" not in plan.parts


def test_unsloth_stays_below_its_share_with_them() -> None:
    shape = four_bits(vocabulary=500_000)
    plan = planned("unsloth", 300 * GIB, shape=shape, length=2048)
    assert plan.dense == 10  # a third: who asks for 4 bits and for "unsloth" wants the memory
    assert plan.peak <= UNSLOTH_SHARE * transformers_peak(shape, 4, 2048)[0]


def test_a_run_that_is_continued_keeps_them() -> None:
    rich, poor = (planned("auto", memory * GIB, shape=four_bits()) for memory in (80, 24))
    assert poor.restored(rich.record()).dense == 32 and rich.restored(poor.record()).dense == poor.dense < 32
    older = {name: value for name, value in rich.record().items() if name != "dense"}
    assert rich.restored(older).dense == 0


SHAPES: dict[str, dict[str, Any]] = {
    "8b": {},
    "4b": {"hidden": 2560, "ffn": 9728, "vocabulary": 151936, "count": 36, "base_bytes": 8 * GIB},
    "135m": {"hidden": 576, "ffn": 1536, "vocabulary": 49152, "count": 30, "base_bytes": GIB // 4, "heads": 9,
             "key_heads": 3, "head_dim": 64},
}  # fmt: skip


@pytest.mark.parametrize(("name", "low", "high"), [("8b", 900, 1700), ("4b", 2200, 3200), ("135m", 30_000, 40_000)])
def test_a_gpu_waits_for_its_host_below_some_tokens(name: str, low: int, high: int) -> None:
    """5 ms a layer, as measured: about 1,300 tokens for 8B, 2,800 for 4B and 36,000 for 135M, in documents of 8,192."""
    own = SHAPES[name]
    shape = large_shape(**own)
    layer = replace(shape.layers[0], heads=shape.heads, key_heads=shape.key_heads, head_dim=shape.head_dim)
    shape = replace(shape, layers=(layer,) * shape.count, ranks=(shape.ranks[0],) * shape.count)
    plan = planned(False, shape=shape, length=8192, batch=1)
    assert low < plan.host_bound < high
    # Attention over short documents is less work a token, so that more tokens are waited for.
    assert planned(False, shape=shape, length=256, batch=1).host_bound > plan.host_bound


def test_a_cpu_launches_nothing_and_neither_do_layers_of_transformers() -> None:
    assert planned(False, shape=large_shape(kind="cpu")).host_bound == 0
    assert planned(False, shape=large_shape(layers=())).host_bound == 0


def test_a_run_that_is_continued_keeps_what_is_waited_for() -> None:
    plan = planned(False)
    other = replace(plan, host_bound=7)
    assert other.restored(plan.record()).host_bound == plan.host_bound > 0
    older = {name: value for name, value in plan.record().items() if name != "host_bound"}
    assert plan.restored(older).host_bound == 0
