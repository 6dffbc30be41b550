"""Products in float8: rows rounded as the definition says, forward and backward of the same weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.core.errors import ShapeError
from tunesmith.engine.scratch import Scratch
from tunesmith.ops.float8 import Float8Product, products, quantize_rows, reference, why_not
from tunesmith.ops.quantized import dequantize, quantize_float8


def numbers(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes.double() * scales.double()


@pytest.mark.parametrize("shape", [(5, 7), (64, 256), (33, 3000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["rows", "factor"])
def test_rows_are_rounded_to_the_nearest_number(shape: tuple[int, int], dtype: torch.dtype, scaled: bool) -> None:
    x = (torch.randn(shape[0], shape[1] + 3) * torch.rand(shape[0], 1).mul(6).exp()).to(dtype)[:, : shape[1]]
    factor = torch.rand(shape[1]) + 0.1 if scaled else None
    codes, scales = quantize_rows(x, factor=factor)
    wanted = x.double() * (1.0 if factor is None else factor.double())
    torch.testing.assert_close(scales[:, 0].double() * 448, wanted.abs().amax(1), rtol=1e-6, atol=0)
    limit = torch.maximum(wanted.abs() * 2**-4, scales.double() * 2**-10)
    assert ((numbers(codes, scales) - wanted).abs() <= limit * (1 + 1e-5)).all()
    other = reference.quantize_rows(x, factor)
    assert torch.equal(codes.view(torch.uint8), other[0].view(torch.uint8)) and torch.equal(scales, other[1])


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = torch.ones(5, 16)
    x[0], x[1], x[2, 3], x[3, 3] = 0.0, 1e-36, torch.inf, torch.nan
    codes, scales = quantize_rows(x)
    assert scales[:2, 0].tolist() == [1.0, 1.0]
    assert not codes[:2].float().any()
    # A product has NaN where one operand has: what went wrong is not hidden by rounding.
    values = numbers(codes, scales).sum(1)
    assert values.isnan().tolist() == [False, False, True, True, False]


def test_what_does_not_fit_is_refused() -> None:
    for x, factor in ((torch.ones(2, 3, 4), None), (torch.ones(3, 4).t(), None), (torch.ones(3, 4), torch.ones(3))):
        with pytest.raises(ShapeError, match="are needed"):
            quantize_rows(x, factor=factor)


def product_of(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Float8Product, torch.Tensor]:
    """Return the product with ``weight``, multiplied in plain torch, and what the weight is rounded to."""
    monkeypatch.setattr(products, "scaled_mm", reference.scaled_mm)
    stored = quantize_float8(weight)
    return Float8Product(stored, Scratch()), dequantize(stored).double()


def test_forward_and_backward_are_those_of_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    made, dense = product_of(torch.randn(48, 32) * torch.rand(48, 1).mul(5).exp(), monkeypatch)
    x, dy = torch.randn(10, 32), torch.randn(10, 48)
    y = made.forward(x, out=torch.empty(10, 48)).double()
    torch.testing.assert_close(y, numbers(*quantize_rows(x)) @ dense.t(), rtol=1e-5, atol=1e-4)
    dx = made.input_gradient(dy, out=torch.empty(10, 32)).double()
    rows = numbers(*quantize_rows(dy, factor=made.weight.scales.view(-1)))
    torch.testing.assert_close(dx, rows @ made.weight.codes.double(), rtol=1e-5, atol=1e-4)
    # Activations have three bits behind the leading one: an error of 2.6 % each, independent of each other.
    for found, wanted in ((y, x.double() @ dense.t()), (dx, dy.double() @ dense)):
        assert 0.005 < float((found - wanted).norm() / wanted.norm()) < 0.05


def test_torch_takes_the_operands_as_they_lie() -> None:
    """torch multiplies float8 on a CPU too, with the same demands on dtypes, strides and shapes of scales."""
    stored = quantize_float8(torch.randn(48, 32))
    x, dy = torch.randn(10, 32), torch.randn(10, 48)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        pytest.skip(f"torch {torch.__version__} multiplies float8 on a CPU with one scale a tensor alone")
    for result, wanted in (
        (Float8Product(stored, Scratch()).forward(x, out=torch.empty(10, 48, dtype=torch.bfloat16)),
         x @ dequantize(stored).t()),
        (Float8Product(stored, Scratch()).input_gradient(dy, out=torch.empty(10, 32, dtype=torch.bfloat16)),
         dy @ dequantize(stored)),
    ):  # fmt: skip
        assert float((result.float() - wanted).norm() / wanted.norm()) < 0.05


def test_the_reason_why_products_are_not_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"is_blocked": False, "dtype": torch.bfloat16, "device": torch.device("cpu")}
    assert why_not((32, 48), **settings) == "cpu does not multiply float8"
    monkeypatch.setattr(products, "computes_float8", lambda device: True)
    assert why_not((32, 48), **settings) is None
    assert why_not((32, 48), **{**settings, "is_blocked": True}) == "a scale belongs to a block, and not to a row"
    assert "computes in float32" in str(why_not((32, 48), **{**settings, "dtype": torch.float32}))
    assert "multiples of 16" in str(why_not((32, 56), **settings))
