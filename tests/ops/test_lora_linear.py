from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.lora_linear import cpu, lora_linear, reference
from tunesmith.ops.lora_linear.cpu import Projection

from ..numerics import assert_equal_in_float64, assert_no_worse


def draws(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return draw


def lora_inputs(*rows: int, inner: int = 12, outer: int = 9, rank: int = 4, bias: bool = False, **more: Any) -> Any:
    draw = draws(sum(rows) + inner)
    return {
        "x": draw(*rows, inner),
        "weight": draw(outer, inner).detach(),
        "a": draw(rank, inner),
        "b": draw(outer, rank),
        "scale": 1.7,
        **({"bias": draw(outer).detach()} if bias else {}),
        **more,
    }


CASES = {
    "plain": lora_inputs(42),
    "odd sizes": lora_inputs(6, 42, inner=123, outer=431, rank=5),
    "one token": lora_inputs(1),
    "no token": lora_inputs(0),
    "rank one": lora_inputs(7, rank=1),
    "rank above the sizes": lora_inputs(7, rank=31),
    "bias": lora_inputs(7, bias=True),
    "scale one": lora_inputs(7, scale=1.0),
    "one feature": lora_inputs(7, inner=1, outer=1),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference(name: str) -> None:
    assert_equal_in_float64(lora_linear, reference.lora_linear, CASES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "odd sizes", "bias"])
def test_as_accurate_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    assert_no_worse(lora_linear, reference.lora_linear, CASES[name], dtype)


@pytest.mark.parametrize("wanted", [("x",), ("a",), ("b",), ("a", "b"), ("x", "b"), ("x", "a", "b")], ids=str)
def test_only_the_gradients_that_are_wanted(wanted: tuple[str, ...]) -> None:
    given = dict(CASES["bias"])
    for name in ("x", "a", "b"):
        given[name] = given[name].detach().requires_grad_(name in wanted)
    assert_equal_in_float64(lora_linear, reference.lora_linear, given)


def test_gradcheck() -> None:
    given = lora_inputs(3, inner=4, outer=5, rank=2, bias=True)
    fixed = {name: given[name] for name in ("scale", "bias")}
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, given["weight"], a, b, **fixed), (given["x"], given["a"], given["b"])
    )


def test_strided_inputs_are_read_right() -> None:
    given = dict(CASES["plain"])
    for name in ("x", "weight", "a", "b"):
        strided = given[name].detach().t().contiguous().t()
        assert not strided.is_contiguous()
        given[name] = strided.requires_grad_(given[name].requires_grad)
    assert_equal_in_float64(lora_linear, reference.lora_linear, given)


def test_wide_adapters_on_a_narrow_base_get_wide_gradients() -> None:
    given = lora_inputs(7)
    narrow = {name: given[name].detach().bfloat16() for name in ("x", "weight")}
    wide = {name: given[name].detach().float().requires_grad_() for name in ("a", "b")}
    output = lora_linear(**narrow, **wide, scale=1.5)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert wide["a"].grad.dtype == wide["b"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [{"x": torch.zeros(7, 11)}, {"weight": torch.zeros(9, 11)}, {"a": torch.zeros(4, 11)}, {"b": torch.zeros(9, 3)},
     {"b": torch.zeros(8, 4)}],
    ids=["x", "weight", "a", "rank", "b"],
)  # fmt: skip
def test_shapes_that_do_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match=r"\(..., D\), \(F, D\), \(R, D\) and \(F, R\) are needed"):
        lora_linear(**{**lora_inputs(7), **change})


# ---- groups of projections: the primitives ----

WIDTH = 10


def group(name: str) -> list[Projection]:
    """Return projections of one input, all of whose tensors are trained."""
    draw = draws(len(name))

    def one(outer: int, rank: int | None, *, bias: bool = False, **more: Any) -> Projection:
        adapter = {} if rank is None else {"a": draw(rank, WIDTH), "b": draw(outer, rank)}
        return Projection(draw(outer, WIDTH), draw(outer) if bias else None, **adapter, **more)

    return {
        "one": lambda: [one(7, 3, scale=2.0)],
        "no adapter": lambda: [one(7, None), one(4, None, bias=True)],
        "three": lambda: [one(8, 3, scale=1.5), one(4, 1), one(4, 5, bias=True, scale=0.3)],
        "some with an adapter": lambda: [one(8, None), one(4, 2, scale=1.5), one(5, None, bias=True)],
        "dropout": lambda: [one(8, 3, dropout=0.4, scale=1.5), one(4, 2, dropout=0.1)],
        "dropout of some": lambda: [one(8, 3, dropout=0.4), one(4, 2), one(3, None), one(4, 2, dropout=0.7, bias=True)],
        "one value": lambda: [one(1, 1, dropout=0.5), one(1, 1)],
    }[name]()


GROUPS = ("one", "no adapter", "three", "some with an adapter", "dropout", "dropout of some", "one value")
SEEDS = (11, 12, 13, 14)


def explicit(x: torch.Tensor, projections: list[Projection]) -> torch.Tensor:
    """The formula, with the masks that are drawn from ``SEEDS``; autograd does its backward."""
    outputs = []
    for index, p in enumerate(projections):
        y = x @ p.weight.t() + (0 if p.bias is None else p.bias)
        if p.a is not None and p.b is not None:
            seen = x
            if p.dropout:
                generator = torch.Generator().manual_seed(SEEDS[index])
                kept = torch.empty_like(x).bernoulli_(1 - p.dropout, generator=generator)
                seen = x * kept / (1 - p.dropout)
            y = y + p.scale * (seen @ p.a.t()) @ p.b.t()
        outputs.append(y)
    return torch.cat(outputs, -1)


def tensors(projections: list[Projection]) -> dict[str, torch.Tensor]:
    named = {
        f"{name} of {i}": getattr(p, name) for i, p in enumerate(projections) for name in ("weight", "bias", "a", "b")
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_equal_the_formula(name: str, stacked: bool, tokens: int) -> None:
    projections = group(name)
    x = draws(5)(tokens, WIDTH)
    together = torch.cat([p.weight.detach() for p in projections]) if stacked else None
    exact = explicit(x, projections)
    dy = draws(6)(*exact.shape).detach()
    leaves = tensors(projections)
    expected = dict(zip(["x", *leaves], torch.autograd.grad(exact, [x, *leaves.values()], dy), strict=True))

    plain = x.detach()
    out = torch.full_like(exact, float("nan"))
    with torch.no_grad():  # as inside an autograd function
        y, s = cpu.forward(plain, together, projections, seeds=SEEDS, out=out)
        assert torch.equal(cpu.low_rank(plain, projections, seeds=SEEDS), s)
        ds = cpu.low_rank_gradient(dy, projections)
        dx = cpu.input_gradient(dy, ds, together, projections, seeds=SEEDS, out=torch.full_like(x, float("nan")))
        found = cpu.parameter_gradients(dy, ds, plain, s, projections, seeds=SEEDS)
    assert y is out
    assert s.shape == ds.shape == (tokens, sum(p.rank for p in projections))
    torch.testing.assert_close(y, exact, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dx, expected["x"], rtol=1e-9, atol=1e-12)
    ours = {f"{key} of {i}": grad for i, grads in enumerate(found) for key, grad in grads.items()}
    assert ours.keys() == leaves.keys()
    for key, grad in ours.items():
        assert grad.shape == leaves[key].shape
        assert grad.is_contiguous()
        torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("wanted", ["weight", "bias", "a", "b"])
@pytest.mark.parametrize("name", ["three", "dropout of some"])
@torch.no_grad()
def test_only_the_parameters_that_are_trained(name: str, wanted: str) -> None:
    frozen = [
        replace(p, **{
            key: None if (tensor := getattr(p, key)) is None else tensor.detach().requires_grad_(key == wanted)
            for key in ("weight", "bias", "a", "b")
        })
        for p in group(name)
    ]  # fmt: skip
    x, dy = torch.randn(5, WIDTH).double(), torch.randn(5, sum(p.weight.shape[0] for p in frozen)).double()
    s, ds = cpu.low_rank(x, frozen, seeds=SEEDS), cpu.low_rank_gradient(dy, frozen)
    for p, grads in zip(frozen, cpu.parameter_gradients(dy, ds, x, s, frozen, seeds=SEEDS), strict=True):
        assert list(grads) == ([] if getattr(p, wanted) is None else [wanted])


@torch.no_grad()
def test_masks_depend_on_the_seed_alone() -> None:
    projections = group("dropout")
    x = torch.randn(9, WIDTH).double()
    torch.manual_seed(1)
    first = cpu.low_rank(x, projections, seeds=SEEDS)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(cpu.low_rank(x, projections, seeds=SEEDS), first)
    assert not torch.equal(cpu.low_rank(x, projections, seeds=(21, 22)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"


@torch.no_grad()
def test_gradients_do_not_share_memory() -> None:
    """An optimizer or a clip that changes one must not change another."""
    projections = group("three")
    x, dy = torch.randn(5, WIDTH).double(), torch.randn(5, 16).double()
    s, ds = cpu.low_rank(x, projections), cpu.low_rank_gradient(dy, projections)
    found = cpu.parameter_gradients(dy, ds, x, s, projections)
    places = [grad.untyped_storage().data_ptr() for grads in found for grad in grads.values()]
    assert len(set(places)) == len(places)
