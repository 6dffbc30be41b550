from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.rope import cpu, norm_rotate, reference, rotate

from ..numerics import assert_equal_in_float64, assert_no_worse


def rope_inputs(tokens: int, heads: int = 3, size: int = 8, *, turned: int | None = None, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(tokens + size)
    angle = 3 * torch.rand(tokens, (size if turned is None else turned) // 2, generator=generator, dtype=torch.float64)
    angle = angle.repeat(1, 2)
    return {
        "heads": torch.randn(tokens, heads, size, generator=generator, dtype=torch.float64).requires_grad_(),
        "cos": angle.cos(),
        "sin": angle.sin(),
        **more,
    }


def with_norm(given: Any, **more: Any) -> Any:
    weight = torch.linspace(0.5, 1.5, given["heads"].shape[-1], dtype=torch.float64).requires_grad_()
    return {**given, "weight": weight, "eps": 1e-6, **more}


CASES = {
    "plain": rope_inputs(13),
    "one token": rope_inputs(1),
    "one head": rope_inputs(7, heads=1),
    "no token": rope_inputs(0),
    "a pair": rope_inputs(5, size=2),
    "part of a head": rope_inputs(6, size=10, turned=4),
    "nothing turned": rope_inputs(6, size=10, turned=0),
    "odd head": rope_inputs(6, size=7, turned=6),
    "several blocks": rope_inputs(300, heads=20, size=64),
}


@pytest.mark.parametrize("name", CASES)
def test_rotation_equals_the_reference(name: str) -> None:
    assert_equal_in_float64(rotate, reference.rotate, CASES[name])


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_norm_and_rotation_equal_the_reference(name: str, offset: float) -> None:
    assert_equal_in_float64(norm_rotate, reference.norm_rotate, with_norm(CASES[name], offset=offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "part of a head", "several blocks"])
def test_as_accurate_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    assert_no_worse(rotate, reference.rotate, CASES[name], dtype)
    assert_no_worse(norm_rotate, reference.norm_rotate, with_norm(CASES[name]), dtype)


@pytest.mark.parametrize("wanted", [("heads",), ("weight",), ("heads", "weight")], ids=str)
def test_only_the_gradients_that_are_wanted(wanted: tuple[str, ...]) -> None:
    given = with_norm(CASES["plain"])
    for name in ("heads", "weight"):
        given[name] = given[name].detach().requires_grad_(name in wanted)
    assert_equal_in_float64(norm_rotate, reference.norm_rotate, given)


def test_gradcheck() -> None:
    given = with_norm(rope_inputs(3, heads=2, size=6, turned=4))
    tables = given["cos"], given["sin"]
    assert torch.autograd.gradcheck(lambda heads: rotate(heads, *tables), (given["heads"],))
    assert torch.autograd.gradcheck(
        lambda heads, weight: norm_rotate(heads, weight, *tables, eps=1e-3, offset=1.0),
        (given["heads"], given["weight"]),
    )


def test_strided_heads_are_read_and_turned_in_place() -> None:
    """As the layer does: q and k beside v in one tensor."""
    given = rope_inputs(9, heads=5)
    qkv = given["heads"].detach().clone()
    view = qkv[:, :3]
    cpu.rotate_(view, given["cos"], given["sin"])
    exact = reference.rotate(given["heads"].detach()[:, :3], given["cos"], given["sin"])
    torch.testing.assert_close(qkv[:, :3], exact)
    assert torch.equal(qkv[:, 3:], given["heads"].detach()[:, 3:])
    cpu.rotate_(view, given["cos"], given["sin"], inverse=True)
    torch.testing.assert_close(qkv, given["heads"].detach())
    strided = with_norm(CASES["plain"])
    strided["heads"] = strided["heads"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert_equal_in_float64(rotate, reference.rotate, {name: strided[name] for name in ("heads", "cos", "sin")})
    assert_equal_in_float64(norm_rotate, reference.norm_rotate, strided)


def test_tables_may_carry_a_scale() -> None:
    """As yarn's do: the backward multiplies by it too."""
    given = rope_inputs(7)
    assert_equal_in_float64(rotate, reference.rotate, {**given, "cos": 1.3 * given["cos"], "sin": 1.3 * given["sin"]})


def test_the_input_stays_as_it_is() -> None:
    given = with_norm(rope_inputs(7))
    before = given["heads"].detach().clone()
    norm_rotate(**given)
    rotate(given["heads"], given["cos"], given["sin"])
    assert torch.equal(given["heads"].detach(), before)


def test_the_gradient_may_be_written_over_what_comes_in() -> None:
    given = with_norm(rope_inputs(7))
    heads, weight = given["heads"], given["weight"]
    exact = reference.norm_rotate(**given)
    incoming = torch.randn_like(exact)
    expected, expected_weight = torch.autograd.grad(exact, (heads, weight), incoming)
    out = torch.full_like(heads, float("nan"))
    plain = heads.detach(), weight.detach(), given["cos"], given["sin"]
    rstd = cpu.norm_rotate(*plain, eps=1e-6, offset=0.0, out=out)
    torch.testing.assert_close(out, exact.detach())
    total = torch.ones_like(weight)
    cpu.norm_rotate_backward(incoming, *plain[:2], rstd, *plain[2:], offset=0.0, out=incoming, dweight=total)
    torch.testing.assert_close(incoming, expected)
    torch.testing.assert_close(total, expected_weight + 1)


@pytest.mark.parametrize(
    "change",
    [{"cos": torch.zeros(6, 8)}, {"cos": torch.zeros(7, 7), "sin": torch.zeros(7, 7)},
     {"cos": torch.zeros(7, 10), "sin": torch.zeros(7, 10)}, {"heads": torch.zeros(7, 8)}],
    ids=["tokens", "odd", "wide", "axes"],
)  # fmt: skip
def test_shapes_that_do_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises((ShapeError, IndexError), match=r"do not fit|out of range"):
        rotate(**{**rope_inputs(7), **change})


def test_a_weight_that_does_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"heads \(7, 3, 8\) and weight \(4,\) do not fit"):
        norm_rotate(**{**with_norm(rope_inputs(7)), "weight": torch.zeros(4)})
