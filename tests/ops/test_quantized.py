"""Quantized weights mean what bitsandbytes says they mean, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.quantized import (
    EightBitWeight,
    FourBitWeight,
    cuda,
    dequantize,
    quantize_float8,
    quantized_linear,
    reference,
)
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
    # As one row: where a row ends within a block, its kernel for AVX512 takes scales of other blocks (0.50.2).
    state.shape = torch.Size((1, matrix.numel()))
    return weight, bnb.dequantize_4bit(codes, state).view(shape)


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
    # In float16 its kernel for some processors rounds otherwise by the last bit.
    near = {"rtol": 2**-10 if dtype == torch.float16 else 0, "atol": 0}
    torch.testing.assert_close(dequantize(weight, dtype=dtype), theirs, **near)
    torch.testing.assert_close(reference.dequantize(weight).to(dtype), theirs, **near)


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


@pytest.mark.parametrize(
    "weight",
    [four_bits((9, 12))[0], eight_bits((9, 12)), quantize_float8(torch.randn(9, 12))],
    ids=["4", "8", "float8"],
)
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


@pytest.mark.parametrize("shape", [(256, 128), (300, 200), (5, 7), (128, 130), (2500, 129)], ids=str)
@pytest.mark.parametrize("by_block", [False, True], ids=["row", "block"])
def test_float8_is_near_in_every_scale_and_reads_alike_in_every_dtype(shape: tuple[int, int], by_block: bool) -> None:
    matrix = torch.randn(shape) * torch.rand(shape[0], 1).mul(9).exp()
    weight = quantize_float8(matrix, by_block=by_block)
    rows, columns = shape
    assert weight.scales.shape == ((-(-rows // 128), -(-columns // 128)) if by_block else (rows, 1))
    for row in (0, rows - 1):  # the largest value of a scale is 448
        start = row // 128 * 128
        part = matrix[start : start + 128, :128] if by_block else matrix[row]
        torch.testing.assert_close(weight.scales[start // 128 if by_block else row, 0] * 448, part.abs().max())
    dense = reference.dequantize(weight)
    # Three bits behind the leading one; what is below 2^-6 of a scale is a multiple of 2^-9 of it.
    scale = dense.new_ones(shape) * reference._every_scale(weight)
    assert ((dense - matrix).abs() <= torch.maximum(matrix.abs() * 2**-4, scale * 2**-10) * 1.0001).all()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(weight, dtype=dtype), dense.to(dtype))
    whole = torch.empty(shape, dtype=torch.bfloat16)
    cuda.dequantize(weight, whole)
    assert torch.equal(whole, dense.bfloat16())


@pytest.mark.parametrize("by_block", [False, True], ids=["row", "block"])
def test_zeros_and_what_is_almost_zero_stay_zero_and_nothing_leaves_the_range(by_block: bool) -> None:
    matrix = torch.zeros(256, 8)
    matrix[128:] = 1e-37
    weight = quantize_float8(matrix, by_block=by_block)
    assert (weight.scales == 1).all() and (dequantize(weight) == 0).all()
    # Divided by the scale that belongs to it, the largest value may lie a rounding above 448, where float8 has no
    # number: it saturates.
    largest = (torch.rand(256, 1) + 0.5).expand(256, 8).contiguous()
    found = dequantize(quantize_float8(largest, by_block=by_block))
    assert found.isfinite().all() and (by_block or torch.allclose(found, largest))


def test_a_weight_of_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"weight \(2, 3, 4\) does not fit: \(F, D\) is needed"):
        quantize_float8(torch.zeros(2, 3, 4))
