"""Micro-batches from recordings, without a GPU: everything but the recording itself.

``PlainRecorder`` runs the work again where a CUDA graph would be replayed, so padding, buffers and gradients are those
of a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.engine.support import adapted, assert_same, base_of, fused, layers_of

from tunesmith.data.collate import DocumentCollator
from tunesmith.engine import graphs
from tunesmith.engine.graphs import Bucket, GraphRunner, PlainRecorder, bucket_of
from tunesmith.engine.head import LossHead
from tunesmith.engine.install import engine_of
from tunesmith.engine.policies import Policy


def joined(*lengths: int, seed: int = 0, trained: bool = True) -> dict[str, Any]:
    """Return documents as a trainer joins them; the last two thirds of each are trained."""
    generator = np.random.default_rng([seed, *lengths])
    features: list[dict[str, Any]] = []
    for length in lengths:
        ids = generator.integers(0, tiny.VOCABULARY, length)
        labels = ids.copy()
        labels[: length // 3 if trained else length] = -100
        features.append({"input_ids": ids, "labels": labels})
    return DocumentCollator()(features)


# Sizes of three buckets, each of them seen twice or more, with other documents; the third is filled to its end.
BATCHES = [joined(*lengths, seed=seed) for seed, lengths in enumerate(
    [(30, 50, 9), (100, 20), (7,), (60, 20, 8), (256,), (90, 31), (1, 17), (100, 156), (130, 126)]
)]  # fmt: skip


def model_in_float64(family: str = "llama", **changes: Any) -> Any:
    return fused(family, adapter={"bias": "lora_only"} if family == "qwen2" else {}, **changes).double()


def head_of(model: Any) -> LossHead:
    return LossHead(base_of(model))


def runner(model: Any, recorder: Any = None, **settings: Any) -> GraphRunner:
    recorder = PlainRecorder() if recorder is None else recorder
    return GraphRunner(head_of(model), model, recorder, **{"most_tokens": 4096, **settings})


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def eager(model: Any, batch: dict[str, Any], divisor: Any) -> torch.Tensor:
    loss = head_of(model).loss(batch, divisor)
    loss.backward()
    return loss.detach()


def outcome(model: Any, step: Callable[..., Any], *batches: dict[str, Any], divisor: Any = 17.0) -> Any:
    """Return losses and summed gradients of an optimizer step over ``batches``."""
    model.zero_grad(set_to_none=True)
    losses = torch.stack([step(batch, divisor) for batch in batches])
    return {"losses": losses, **gradients(model)}


@contextmanager
def poisoned() -> Iterator[None]:
    """Let every uninitialized tensor hold NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# ---- the same numbers ----


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral"])
def test_losses_and_gradients_are_those_of_the_step_it_stands_for(family: str) -> None:
    model = model_in_float64(family)
    run = runner(model)
    with poisoned():
        for batch in BATCHES:
            exact = outcome(model, lambda *given: eager(model, *given), batch)
            assert_same(outcome(model, run.step, batch), exact, 1e-12)
    assert run.off is None and run.recorded == 3 and run.replayed == 4 and run.launched == 5


@pytest.mark.parametrize("policy", [policy for policy in Policy if policy is not Policy.OFFLOAD])
def test_under_every_policy(policy: Policy) -> None:
    model = model_in_float64("gemma2")
    engine_of(model).set_policy(policy)  # type: ignore[union-attr]
    run = runner(model)
    for batch in BATCHES[:6]:
        exact = outcome(model, lambda *given: eager(model, *given), batch)
        assert_same(outcome(model, run.step, batch), exact, 1e-12)
    assert run.replayed == 2


def test_all_weights_may_train() -> None:
    model = fused("qwen3").double()  # embedding and head are one weight
    run = runner(model)
    for batch in BATCHES[:4]:
        exact = outcome(model, lambda *given: eager(model, *given), batch)
        assert_same(outcome(model, run.step, batch), exact, 1e-12)
    assert run.replayed == 1


def test_micro_batches_add_up_whichever_way_each_was_computed() -> None:
    model = model_in_float64()
    run = runner(model, most_tokens=256)
    long = joined(200, 100)
    batches = [BATCHES[0], long, BATCHES[1], BATCHES[3], long, BATCHES[5]]

    def mixed(batch: dict[str, Any], divisor: Any) -> torch.Tensor:
        loss = run.step(batch, divisor)
        return eager(model, batch, divisor) if loss is None else loss

    exact = outcome(model, lambda *given: eager(model, *given), *batches)
    for _ in range(3):
        assert_same(outcome(model, mixed, *batches), exact, 1e-12)
    assert run.replayed == 12 - run.launched > 0


@pytest.mark.parametrize("clear", ["none", "zero", "replaced"])
def test_gradients_may_be_cleared_in_every_way(clear: str) -> None:
    model = model_in_float64()
    run = runner(model)
    exact = outcome(model, lambda *given: eager(model, *given), BATCHES[1])
    kept = torch.full((), 3.0, dtype=torch.float64)
    for _ in range(3):
        model.zero_grad(set_to_none=clear != "zero")
        if clear == "replaced":
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = kept.expand_as(parameter).clone()
        loss = run.step(BATCHES[1], 17.0)
        found = gradients(model)
        if clear == "replaced":
            found = {name: grad - kept for name, grad in found.items()}
        assert_same({"losses": loss[None], **found}, exact, 1e-11 if clear == "replaced" else 1e-12)  # type: ignore[index]


def test_a_loss_that_was_returned_stays() -> None:
    model = model_in_float64()
    run = runner(model)
    first = run.step(BATCHES[1], 17.0)
    before = first.clone()  # type: ignore[union-attr]
    run.step(BATCHES[5], 17.0)
    assert torch.equal(before, first) and run.replayed == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("divisor", [29, 29.0, torch.tensor(29.0), torch.tensor(29)], ids=repr)
def test_the_divisor_is_an_input(divisor: Any) -> None:
    model = model_in_float64()
    run = runner(model)
    for other in (3.0, divisor, 5.0, divisor):
        exact = outcome(model, lambda *given: eager(model, *given), BATCHES[1], divisor=other)
        assert_same(outcome(model, run.step, BATCHES[1], divisor=other), exact, 1e-12)


def test_nothing_trained_is_a_loss_and_gradients_of_zero() -> None:
    model = model_in_float64()
    run = runner(model)
    for seed in range(3):
        run.step(BATCHES[2], 17.0)
        found = outcome(model, run.step, joined(20, 9, trained=False, seed=seed))
        assert len(found) > 1 and all(bool((value == 0).all()) for value in found.values())


def test_what_pads_gives_nothing_however_large_it_is() -> None:
    model = model_in_float64()
    free = [batch for batch in BATCHES[:6] if not bool((batch["input_ids"] == 0).any())]
    exact = [outcome(model, lambda *given: eager(model, *given), batch) for batch in free]
    with torch.no_grad():
        base_of(model).get_input_embeddings().weight[0] = 1e15  # the token that pads
    run = runner(model)
    for batch, own in zip(free, exact, strict=True):
        assert_same(outcome(model, run.step, batch), own, 1e-12)
    assert len(free) > 3 and run.replayed


def test_parameters_that_the_loss_does_not_reach_keep_no_gradient() -> None:
    model = model_in_float64()
    unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    base_of(model).unused = unused
    run = runner(model)
    for _ in range(3):
        run.step(BATCHES[1], 17.0)
    assert unused.grad is None and run.replayed == 2


def test_two_models_side_by_side() -> None:
    models = [model_in_float64(seed=seed) for seed in (0, 1)]
    runs = [runner(model) for model in models]
    exact = [outcome(m, lambda *given, m=m: eager(m, *given), BATCHES[1], BATCHES[5]) for m in models]
    for model in models:
        model.zero_grad(set_to_none=True)
    losses = [[run.step(batch, 17.0) for run in runs] for batch in (BATCHES[1], BATCHES[5])]
    for index, model in enumerate(models):
        own = torch.stack([pair[index] for pair in losses])  # type: ignore[misc]
        assert_same({"losses": own, **gradients(model)}, exact[index], 1e-12)


def test_training_learns_what_it_learned_before() -> None:
    found: list[dict[str, torch.Tensor]] = []
    for recorded in (False, True):
        model = model_in_float64()
        run = runner(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for number in range(6):
            for batch in BATCHES[number : number + 3]:
                run.step(batch, 17.0) if recorded else eager(model, batch, 17.0)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found.append({name: p.detach() for name, p in model.named_parameters()})
    assert_same(found[1], found[0], 1e-10)


# ---- buckets ----


@pytest.mark.parametrize(
    ("sizes", "bucket"),
    [
        ((1, 1, 0), (256, 2, 64)),
        ((256, 1, 64), (256, 2, 64)),
        ((257, 2, 129), (512, 4, 256)),
        ((4096, 3, 4095), (4096, 4, 4096)),
        ((4097, 4, 1), (5120, 8, 1280)),
        ((29_000, 200, 14_849), (29_696, 256, 22_272)),
    ],
)
def test_buckets(sizes: tuple[int, int, int], bucket: tuple[int, int, int]) -> None:
    assert bucket_of(*sizes) == Bucket(*bucket)
    tokens, documents, rows = sizes
    assert bucket[0] >= tokens and bucket[1] > documents and bucket[2] >= rows


def test_every_buffer_is_written_anew() -> None:
    """What the inputs of a recording hold after a batch does not depend on what they held before."""
    batch = BATCHES[0]
    bucket = bucket_of(batch["input_ids"].shape[1], 3, len(batch["rows"]))
    fresh, stale = (graphs._Inputs(bucket, torch.device("cpu")) for _ in range(2))
    tensors = [value for value in stale.batch.values() if isinstance(value, torch.Tensor)]
    for value in (*tensors, stale.divisor):
        value.fill_(2**30)
    for inputs in (fresh, stale):
        inputs.fill(batch, 3.0)
    for name, value in fresh.batch.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, stale.batch[name]), name
    assert fresh.divisor == stale.divisor == 3.0
    tokens, rows = 89, len(batch["rows"])
    assert fresh.batch["cu_seqlens"].tolist() == [0, 30, 80, 89, 256]
    assert fresh.batch["position_ids"][0, tokens:].tolist() == list(range(256 - tokens))
    assert fresh.batch["rows"][rows:].unique().tolist() == [255]
    assert fresh.batch["targets"][rows:].unique().tolist() == [-100]


def test_long_micro_batches_are_left_to_the_caller() -> None:
    model = model_in_float64()
    run = runner(model, most_tokens=300)
    model.zero_grad(set_to_none=True)
    assert run.step(joined(200, 57), 1.0) is None and run.step(joined(200, 56), 1.0) is not None
    assert run.launched == 1


def test_no_more_is_recorded_than_allowed() -> None:
    model = model_in_float64()
    run = runner(model, most_graphs=1)
    for _ in range(3):
        for batch in BATCHES[1:3]:
            exact = outcome(model, lambda *given: eager(model, *given), batch)
            assert_same(outcome(model, run.step, batch), exact, 1e-12)
    assert (run.recorded, run.replayed, run.launched) == (1, 2, 4)


def test_buffers_of_the_engine_are_not_those_of_a_recording() -> None:
    """A later and longer step frees the engine's buffers; a recording goes on writing to its own."""
    model = model_in_float64()
    engine = engine_of(model)
    before = engine.scratch  # type: ignore[union-attr]
    before.clear()
    run = runner(model)
    run.step(BATCHES[1], 17.0)
    assert engine.scratch is before and before.nbytes() == 0  # type: ignore[union-attr]


# ---- what changes between steps ----


def moved(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def frozen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.requires_grad_(False)


def rescaled(model: Any) -> None:
    layers_of(model)[0].mlp.up_proj.scaling["default"] = 0.125


def another_policy(model: Any) -> None:
    engine_of(model).set_policy(Policy.FULL)  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [moved, frozen, rescaled, another_policy])
def test_recordings_of_what_has_changed_are_dropped(change: Callable[[Any], None]) -> None:
    model = model_in_float64()
    run = runner(model)
    for _ in range(2):
        run.step(BATCHES[1], 17.0)
    assert run.recorded == 1
    change(model)
    exact = outcome(model, lambda *given: eager(model, *given), BATCHES[1])
    assert_same(outcome(model, run.step, BATCHES[1]), exact, 1e-12)
    assert (run.recorded, run.launched) == (0, 2)
    assert_same(outcome(model, run.step, BATCHES[1]), exact, 1e-12)
    assert run.recorded == 1 and run.off is None


def test_another_adapter_trains_next() -> None:
    model = adapted(model_in_float64(), name="second", seed=5).double()
    run = runner(model)
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        for _ in range(2):
            exact = outcome(model, lambda *given: eager(model, *given), BATCHES[1])
            assert any(f".{name}." in key for key in exact)
            assert_same(outcome(model, run.step, BATCHES[1]), exact, 1e-12)
    assert run.replayed == 3


def test_weights_that_never_stay_end_it(caplog: pytest.LogCaptureFixture) -> None:
    model = model_in_float64()
    run = runner(model)
    with caplog.at_level(logging.WARNING):
        answers = [run.step(BATCHES[1], 17.0) is None for _ in range(8) if moved(model) is None]
    assert answers == 4 * [False] + 4 * [True]
    (record,) = caplog.records
    assert record.message == (
        "CUDA graphs are off, steps are launched kernel by kernel: weights are moved, or other ones trained, again "
        "and again"
    )


def test_layers_that_run_the_slower_way_are_not_recorded() -> None:
    model = model_in_float64()
    run = runner(model)
    run.step(BATCHES[1], 17.0)
    engine_of(model).note("a test")  # type: ignore[union-attr]
    model.zero_grad(set_to_none=True)
    assert run.step(BATCHES[1], 17.0) is None and not gradients(model)
    assert run.off == "decoder layers run as transformers wrote them: a test"


# ---- a recording that fails ----


class Failing(PlainRecorder):
    """Fails where a recording would, as torch does: by one error, and another one when the recording ends."""

    def __init__(self, cause: BaseException, last: BaseException | None) -> None:
        self.cause, self.last = cause, last

    def record(self, work: Any) -> Any:
        """Fail."""
        try:
            work()
            raise self.cause
        finally:
            if self.last is not None:
                raise self.last


FORBIDDEN = RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might ...")
ENDED = RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("cause", "last", "reason"),
    [
        (FORBIDDEN, ENDED, "CUDA error: operation not permitted when stream is capturing"),
        (FORBIDDEN, None, "CUDA error: operation not permitted when stream is capturing"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to ..."), None, "CUDA out of memory. Tried to ..."),
    ],
)
def test_a_recording_that_fails_leaves_the_step_to_the_caller(
    cause: BaseException, last: BaseException | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_in_float64()
    run = runner(model, Failing(cause, last))
    batches = [BATCHES[1], BATCHES[5], BATCHES[1]]
    exact = outcome(model, lambda *given: eager(model, *given), *batches)

    def mixed(batch: dict[str, Any], divisor: Any) -> torch.Tensor:
        try:
            raise KeyError("what someone handles while he trains")
        except KeyError:
            loss = run.step(batch, divisor)
        return eager(model, batch, divisor) if loss is None else loss

    with caplog.at_level(logging.WARNING):
        # What fails has added to the sums here, which a recording does not: they are loaded anew.
        assert_same(outcome(model, mixed, *batches[:1]), outcome(model, run_eager(model), *batches[:1]), 1e-12)
        assert_same(outcome(model, mixed, *batches), exact, 1e-12)
        assert_same(outcome(model, mixed, *batches), exact, 1e-12)
    assert run.off == reason and run.recorded == 0
    assert [record.message for record in caplog.records] == [
        f"CUDA graphs are off, steps are launched kernel by kernel: {reason}"
    ]


def run_eager(model: Any) -> Callable[..., torch.Tensor]:
    return lambda *given: eager(model, *given)


@pytest.mark.parametrize(
    ("cause", "last"),
    [(RuntimeError("CUDA error: an illegal memory access"), None), (ValueError("capture"), ENDED), (KeyError(1), None)],
)
def test_another_error_is_raised(cause: BaseException, last: BaseException | None) -> None:
    model = model_in_float64()
    run = runner(model, Failing(cause, last))
    run.step(BATCHES[1], 17.0)
    with pytest.raises(type(cause if last is None else last)):
        run.step(BATCHES[1], 17.0)
    assert run.off is None
