from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.linear_cross_entropy import function, linear_cross_entropy, linear_log_probs, reference

from ..numerics import assert_equal_in_float64, assert_no_worse


def loss_inputs(rows: int, *, hidden: int = 6, vocabulary: int = 31, bias: bool = False, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "hidden": draw(rows, hidden),
        "weight": draw(vocabulary, hidden),
        "targets": torch.randint(vocabulary, (rows,), generator=generator),
        **({"bias": draw(vocabulary)} if bias else {}),
        **more,
    }


CASES = {
    "plain": loss_inputs(42),
    "one row": loss_inputs(1),
    "bias": loss_inputs(7, bias=True),
    "divisor": loss_inputs(7, divisor=123.0),
    "tensor divisor": loss_inputs(7, divisor=torch.tensor(17.0)),
    "scale": loss_inputs(7, logit_scale=0.25),
    "softcap": loss_inputs(7, softcap=1.5),
    "label smoothing": loss_inputs(7, label_smoothing=0.1),
    "everything": loss_inputs(9, bias=True, divisor=9.0, logit_scale=3.0, softcap=2.0, label_smoothing=0.2),
    "odd sizes": loss_inputs(13, hidden=123, vocabulary=431),
    "one word": loss_inputs(5, vocabulary=1),
}


def with_idle_rows(given: dict[str, Any]) -> dict[str, Any]:
    targets = given["targets"].clone()
    targets[1::3] = -100
    return {**given, "targets": targets, "has_idle": True}


CASES |= {f"idle rows, {name}": with_idle_rows(CASES[name]) for name in ("plain", "everything", "tensor divisor")}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_reference(name: str) -> None:
    # logsumexp of large sums is exact to about 1e-9 only relative to the largest term, as in the reference.
    assert_equal_in_float64(linear_cross_entropy, reference.linear_cross_entropy, CASES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "odd sizes", "everything"])
def test_as_accurate_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    assert_no_worse(linear_cross_entropy, reference.linear_cross_entropy, CASES[name], dtype)


@pytest.mark.parametrize("rows", [15, 16, 17, 32, 50])
def test_chunks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk holds at least 16 rows; here exactly 16."""
    monkeypatch.setattr(function, "_CHUNK_BYTES", 1)
    assert_equal_in_float64(linear_cross_entropy, reference.linear_cross_entropy, loss_inputs(rows, bias=True))


@pytest.mark.parametrize("call", [linear_cross_entropy, linear_log_probs])
@pytest.mark.parametrize("trains", [True, False])
def test_the_logits_of_one_chunk_are_there_at_a_time(call: Any, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function, "_CHUNK_BYTES", 0)  # 16 rows a chunk
    linear, before = torch.nn.functional.linear, []

    def watched(*args: Any) -> torch.Tensor:
        assert not any(logits() is not None for logits in before)
        made = linear(*args)
        before.append(weakref.ref(made))
        return made

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    inputs = loss_inputs(50, bias=True)
    with torch.set_grad_enabled(trains):
        found = call(**inputs)
    if trains:
        found.sum().backward()
    assert len(before) >= 4


def test_a_vocabulary_whose_chunks_are_small() -> None:
    given = loss_inputs(40, hidden=4, vocabulary=400_001, divisor=40.0)
    given["weight"] = given["weight"].detach()
    assert_equal_in_float64(linear_cross_entropy, reference.linear_cross_entropy, given)


@pytest.mark.parametrize(
    "wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight", "bias")], ids=str
)
def test_only_the_gradients_that_are_wanted(wanted: tuple[str, ...]) -> None:
    given = loss_inputs(11, bias=True, softcap=2.0)
    some = {
        name: value.detach().requires_grad_(name in wanted)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in given.items()
    }
    assert_equal_in_float64(linear_cross_entropy, reference.linear_cross_entropy, some)


def test_no_rows_give_zero_with_a_graph() -> None:
    given = loss_inputs(0, bias=True)
    loss = linear_cross_entropy(**given)
    assert loss.item() == 0.0
    loss.backward()
    assert given["hidden"].grad.shape == (0, 6)
    assert not given["weight"].grad.any()
    assert not given["bias"].grad.any()


def test_without_gradients_nothing_is_computed_for_them() -> None:
    given = loss_inputs(7)
    with torch.no_grad():
        loss = linear_cross_entropy(**given)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference.linear_cross_entropy(**given).detach())


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 1.5}, {"logit_scale": 0.5, "divisor": 3.0}, {"label_smoothing": 0.3}], ids=str
)
def test_gradcheck(options: dict[str, Any]) -> None:
    given = loss_inputs(4, hidden=3, vocabulary=7, bias=True)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, given["targets"], bias=bias, **options),
        (given["hidden"], given["weight"], given["bias"]),
    )


def test_large_logits_stay_finite() -> None:
    given = loss_inputs(8)
    given["hidden"] = (given["hidden"].detach().float() * 1e4).requires_grad_()
    given["weight"] = given["weight"].detach().float()
    loss = linear_cross_entropy(**given)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(given["hidden"].grad).all()
    torch.testing.assert_close(loss, reference.linear_cross_entropy(**given))


def test_losses_of_many_small_rows_do_not_round_away() -> None:
    """float32 sums of 200,000 losses near 0.7 lose digits; the sum here is kept in float64."""
    rows = 200_000
    hidden, weight = torch.zeros(rows, 2), torch.zeros(2, 2)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.long))
    assert loss.item() == pytest.approx(rows * 0.6931471805599453, rel=1e-7)


def test_the_loss_is_wide_for_narrow_input() -> None:
    given = {
        name: value.detach().bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in CASES["plain"].items()
    }
    assert linear_cross_entropy(**given).dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [{"hidden": torch.zeros(7, 5)}, {"weight": torch.zeros(31, 5)}, {"targets": torch.zeros(6, dtype=torch.long)},
     {"hidden": torch.zeros(1, 7, 6)}],
    ids=["hidden", "weight", "targets", "axes"],
)  # fmt: skip
def test_shapes_that_do_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match=r"\(N, D\), \(V, D\) and \(N,\) are needed"):
        linear_cross_entropy(**{**loss_inputs(7), **change})


LOG_PROBS = {
    "plain": loss_inputs(42),
    "one row": loss_inputs(1),
    "no rows": loss_inputs(0),
    "everything": loss_inputs(50, bias=True, logit_scale=3.0, softcap=2.0),
}


@pytest.mark.parametrize("name", LOG_PROBS)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight", "bias")], ids=str)
def test_log_probs_equal_the_reference(name: str, trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row with a gradient of its own, over several chunks."""
    monkeypatch.setattr(function, "_CHUNK_BYTES", 1)
    given = {
        name: value.detach().requires_grad_(name in trained)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in LOG_PROBS[name].items()
    }
    assert_equal_in_float64(linear_log_probs, reference.linear_log_probs, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_are_as_accurate_as_plain_torch(dtype: torch.dtype) -> None:
    assert_no_worse(linear_log_probs, reference.linear_log_probs, LOG_PROBS["everything"], dtype)


def test_log_probs_refuse_shapes_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"\(N, D\), \(V, D\) and \(N,\) are needed"):
        linear_log_probs(**{**loss_inputs(7), "hidden": torch.zeros(7, 5)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_idle_rows_give_nothing_whatever_is_in_them(dtype: torch.dtype) -> None:
    given = {name: x.detach().to(dtype) if x.is_floating_point() else x for name, x in loss_inputs(6).items()}
    given["targets"][2:4] = -100
    given["hidden"][2:4] = float("nan")
    hidden = given.pop("hidden").requires_grad_()
    loss = linear_cross_entropy(hidden, **given, has_idle=True)
    (grad,) = torch.autograd.grad(loss, hidden)
    kept = [0, 1, 4, 5]
    assert bool((grad[2:4] == 0).all()) and bool(grad[kept].abs().sum(1).all())
    alone = linear_cross_entropy(hidden.detach()[kept], given["weight"], given["targets"][kept])
    torch.testing.assert_close(loss.detach(), alone)


def test_only_idle_rows_have_a_loss_of_zero() -> None:
    given = {**loss_inputs(3), "targets": torch.full((3,), -100)}
    loss = linear_cross_entropy(**given, has_idle=True)
    grads = torch.autograd.grad(loss, [given["hidden"], given["weight"]])
    assert loss.item() == 0 and all(bool((grad == 0).all()) for grad in grads)
