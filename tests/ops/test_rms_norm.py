from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.rms_norm import cpu, function, reference, rms_norm
from tunesmith.ops.rows import row_blocks

from ..numerics import assert_equal_in_float64, assert_no_worse


def norm_inputs(*shape: int, scale: float = 1.0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return {
        "x": (scale * draw(*shape)).requires_grad_(),
        "weight": (1 + 0.2 * draw(shape[-1])).requires_grad_(),
        "eps": 1e-6,
        **more,
    }


CASES = {
    "plain": norm_inputs(42, 64),
    "odd sizes": norm_inputs(6, 42, 123),
    "one token": norm_inputs(1, 33),
    "one value a row": norm_inputs(5, 1),
    "empty": norm_inputs(0, 16),
    "offset": norm_inputs(7, 32, offset=1.0),
    "large eps": norm_inputs(7, 32, eps=0.5),
    "small values": norm_inputs(7, 32, scale=1e-4),
    "several blocks": norm_inputs(70, 4000),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference(name: str) -> None:
    assert_equal_in_float64(rms_norm, reference.rms_norm, CASES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "odd sizes", "offset", "several blocks"])
def test_as_accurate_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    assert_no_worse(rms_norm, reference.rms_norm, CASES[name], dtype)


def test_blocks_are_smaller_than_the_case_that_needs_several() -> None:
    assert len(list(row_blocks(70, 4000, 8))) > 1
    assert list(row_blocks(0, 16, 8)) == []


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("x", "weight")], ids=str)
def test_only_the_gradients_that_are_wanted(wanted: tuple[str, ...]) -> None:
    given = dict(CASES["offset"])
    for name in ("x", "weight"):
        given[name] = given[name].detach().requires_grad_(name in wanted)
    assert_equal_in_float64(rms_norm, reference.rms_norm, given)


def test_strided_inputs_are_read_right() -> None:
    given = dict(CASES["plain"])
    given["x"] = given["x"].detach().t().contiguous().t().requires_grad_()
    assert not given["x"].is_contiguous()
    assert_equal_in_float64(rms_norm, reference.rms_norm, given)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradcheck(offset: float) -> None:
    given = norm_inputs(3, 5)
    assert torch.autograd.gradcheck(
        lambda x, weight: rms_norm(x, weight, eps=1e-3, offset=offset), (given["x"], given["weight"])
    )


def test_the_primitives_add_residuals_and_write_where_they_are_told() -> None:
    given = norm_inputs(9, 20)
    x, weight = given["x"].detach(), given["weight"].detach()
    residual, dh, dresidual = (torch.randn_like(x) for _ in range(3))
    out = torch.full_like(x, float("nan"))
    h, total, rstd = cpu.forward(x, weight, eps=1e-6, offset=1.0, residual=residual, out=out)
    assert h is out
    assert torch.equal(total, x + residual)
    leaf = total.clone().requires_grad_()
    exact = reference.rms_norm(leaf, weight, eps=1e-6, offset=1.0)
    torch.testing.assert_close(h, exact.detach())
    (expected,) = torch.autograd.grad(exact, leaf, dh)
    for target in (torch.full_like(x, float("nan")), dh.clone(), dresidual.clone()):
        # The output may be one of the inputs.
        own_dh = target if torch.equal(target, dh) else dh
        own_residual = target if torch.equal(target, dresidual) else dresidual
        found = cpu.backward(own_dh, total, weight, rstd, offset=1.0, dresidual=own_residual, out=target)
        assert found is target
        torch.testing.assert_close(found, expected + dresidual)


def test_large_and_zero_values_stay_finite() -> None:
    for scale in (0.0, 1e4):
        given = norm_inputs(4, 8)
        x = (given["x"].detach().bfloat16() * scale).requires_grad_()
        output = rms_norm(x, given["weight"].bfloat16(), eps=1e-6)
        output.sum().backward()
        assert torch.isfinite(output).all()
        assert x.grad is not None and torch.isfinite(x.grad).all()


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"x \(2, 5\) and weight \(4,\) do not fit"):
        rms_norm(torch.zeros(2, 5), torch.zeros(4), eps=1e-6)


def test_kernels_are_given_columns_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU step from one column to the next by one value; the gradient of a sum does not lie so."""
    seen: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            def call(*tensors: Any, **options: Any) -> Any:
                seen.extend(x.stride(-1) for x in tensors)
                return getattr(cpu, name)(*tensors, **options)

            return call

    monkeypatch.setattr(function, "primitives", lambda name, x: Watched())
    x, weight = torch.randn(32, 7).t().requires_grad_(), torch.rand(32).requires_grad_()
    rms_norm(x, weight, eps=1e-6).sum().backward()
    assert len(seen) > 6 and set(seen) == {1}
    monkeypatch.undo()
    again = x.detach().clone().requires_grad_()
    rms_norm(again, weight, eps=1e-6).sum().backward()
    assert x.grad is not None and again.grad is not None and torch.equal(x.grad, again.grad)
