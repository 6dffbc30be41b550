"""Quantized weights mean what bitsandbytes says they mean, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.quantized import EightBitWeight, FourBitWeight, dequantize, quantized_linear, reference
from tunesmith.ops.quantized.weights import Nested

# Odd columns, a last block that is not full, more than one piece.
SHAPES = [(64, 32), (33, 62), (5, 7), (1, 64), (1200, 256)]


def four_bits(
    shape: tuple[int, int], *, kind: str = "nf4", dtype: torch.dtype = torch.float32, nested: bool = True
) -> Any:
    """Return a quantized random matrix, and what bitsandbytes reads in it."""
    matrix = (0.05 * torch.randn(shape)).to(dtype)
    codes, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type=kind, compress_statistics=nested)
    second = None
    if nested:
        second = Nested(state.state2.code, state.state2.absmax, state.state2.blocksize, state.offset)
    weight = FourBitWeight(codes, state.code, state.absmax, state.blocksize, shape, kind, second)
    return weight, bnb.dequantize_4bit(codes, state)


def eight_bits(shape: tuple[int, int]) -> EightBitWeight:
    codes, scales, _ = bnb.int8_vectorwise_quant((0.05 * torch.randn(shape)).half())
    return EightBitWeight(codes, scales)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_four_bits_are_those_of_bitsandbytes(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, nested: bool
) -> None:
    weight, theirs = four_bits(shape, kind=kind, dtype=dtype, nested=nested)
    assert torch.equal(dequantize(weight, dtype=dtype), theirs)
    assert torch.equal(reference.dequantize(weight).to(dtype), theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bits_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = eight_bits(shape)
    theirs = bnb.int8_vectorwise_dequant(weight.codes, weight.scales)
    torch.testing.assert_close(dequantize(weight), theirs, rtol=1e-6, atol=0)
    assert torch.equal(dequantize(weight), reference.dequantize(weight))


def test_a_buffer_that_starts_anywhere_is_filled_and_nothing_beside_it() -> None:
    weight, theirs = four_bits((6, 64))
    for start in (0, 1, 3):
        buffer = torch.full((start + 6 * 64 + 5,), float("nan"))
        dequantize(weight, out=buffer[start : start + 6 * 64].view(6, 64))
        assert torch.equal(buffer[start : start + 6 * 64].view(6, 64), theirs)
        assert buffer[:start].isnan().all() and buffer[start + 6 * 64 :].isnan().all()


@pytest.mark.parametrize("out", [torch.empty(4, 64), torch.empty(64, 6).t()], ids=["shape", "stride"])
def test_a_buffer_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"\(6, 64\), contiguous, is needed"):
        dequantize(four_bits((6, 64))[0], out=out)


@pytest.mark.parametrize("weight", [four_bits((9, 12))[0], eight_bits((9, 12))], ids=["4", "8"])
def test_a_linear_layer_has_the_gradients_of_its_dense_weight(weight: Any) -> None:
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    dense = reference.dequantize(weight).double()
    assert torch.autograd.gradcheck(lambda x, b: quantized_linear(x, weight, b), (x, bias))
    torch.testing.assert_close(quantized_linear(x, weight, bias), torch.nn.functional.linear(x, dense, bias))
    torch.testing.assert_close(quantized_linear(x, weight), x @ dense.t())


def test_nothing_dense_is_saved_for_the_backward() -> None:
    weight, _ = four_bits((64, 32))
    saved: list[torch.Tensor] = []
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quantized_linear(x, weight)
    assert not saved


def test_inner_dimensions_that_differ_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"x \(2, 3\) and weight \(9, 12\) do not fit"):
        quantized_linear(torch.zeros(2, 3), replace(four_bits((9, 12))[0]))
