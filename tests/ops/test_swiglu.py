from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.swiglu import ACTIVATIONS, cpu, reference, swiglu

from ..numerics import assert_equal_in_float64, assert_no_worse


def gate_inputs(*shape: int, scale: float = 2.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"gate_up": drawn.requires_grad_()}


CASES = {
    "plain": gate_inputs(42, 64),
    "odd sizes": gate_inputs(6, 42, 2 * 123),
    "one token": gate_inputs(1, 22),
    "one value": gate_inputs(5, 2),
    "empty": gate_inputs(0, 16),
    "large values": gate_inputs(9, 16, scale=30.0),
    "several blocks": gate_inputs(70, 8000),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference(name: str, activation: str) -> None:
    assert_equal_in_float64(swiglu, reference.swiglu, {**CASES[name], "activation": activation})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["plain", "odd sizes", "several blocks"])
def test_as_accurate_as_plain_torch(name: str, activation: str, dtype: torch.dtype) -> None:
    assert_no_worse(swiglu, reference.swiglu, {**CASES[name], "activation": activation}, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    given = gate_inputs(3, 8)
    assert torch.autograd.gradcheck(lambda x: swiglu(x, activation=activation), (given["gate_up"],))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strided_inputs_are_read_right(activation: str) -> None:
    strided = CASES["plain"]["gate_up"].detach().t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous()
    assert_equal_in_float64(swiglu, reference.swiglu, {"gate_up": strided, "activation": activation})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_backward_may_write_over_its_input_and_gives_the_output_again(activation: str, dtype: torch.dtype) -> None:
    gate_up = CASES["odd sizes"]["gate_up"].detach().flatten(0, 1).to(dtype)
    forward = cpu.forward(gate_up, activation=activation)
    incoming = torch.randn_like(forward)
    expected = cpu.backward(incoming, gate_up, activation=activation)
    again, own = torch.full_like(forward, float("nan")), gate_up.clone()
    found = cpu.backward(incoming, own, activation=activation, out=own, hidden_out=again)
    assert found is own
    assert torch.equal(found, expected)
    torch.testing.assert_close(again, forward)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_very_large_values_stay_finite(activation: str) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -3e4, 3e4, 1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    output = swiglu(gate_up, activation=activation)
    output.sum().backward()
    torch.testing.assert_close(output, torch.tensor([[0.0, 200.0, 0.0, 3e4]]))
    assert gate_up.grad is not None
    torch.testing.assert_close(gate_up.grad[0, :4], torch.tensor([0.0, 1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("gate_up", "activation"), [(torch.zeros(3, 5), "silu"), (torch.zeros(3, 4), "relu")], ids=["odd", "activation"]
)
def test_what_is_refused(gate_up: torch.Tensor, activation: str) -> None:
    with pytest.raises(ShapeError, match="an even last axis and one of silu, gelu_tanh are needed"):
        swiglu(gate_up, activation=activation)
