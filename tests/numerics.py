"""Is a fast path as accurate as plain torch? One answer for every op, dtype and gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

# Rounding differs between two right answers: the error may be a little larger on average, and twice as large in the
# worst element. Calibrated on float32 and bfloat16 attention and cross-entropy; to be kept.
_RMS, _MAX = 1.1, 2.0
_SLACK = {torch.float32: 1e-7, torch.bfloat16: 2e-4, torch.float16: 3e-5}


def outputs_and_grads(
    op: Callable[..., torch.Tensor], inputs: Mapping[str, Any], dtype: torch.dtype, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Run ``op`` on floating inputs cast to ``dtype``; return its output and every gradient under a fixed cotangent."""
    leaves = {name: _leaf(value, dtype) for name, value in inputs.items()}
    output = op(**leaves)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    if output.ndim == 0:
        # A loss gets 1 or a loss scale: not 1, so that forgetting it shows, and exact in every dtype.
        cotangent.fill_(0.5)
    output.backward(cotangent.to(output.dtype))
    found = {"output": output.detach()}
    for name, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            assert leaf.grad is not None, f"{name} got no gradient"
            found[f"grad of {name}"] = leaf.grad
    return found


def _leaf(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    # Through dtype first, so that truth and candidate start from the same numbers; strides are kept.
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def assert_no_worse(
    op: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    inputs: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Assert that ``op`` in ``dtype`` is as near to the float64 truth as ``reference`` in ``dtype``.

    Compares root mean square and largest error of the output and of every gradient.
    """
    rounded = {
        name: value.detach().to(dtype).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    truth = outputs_and_grads(reference, rounded, torch.float64)
    base = outputs_and_grads(reference, rounded, dtype)
    ours = outputs_and_grads(op, rounded, dtype)
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        scale = float(exact.abs().max()) + 1e-30
        slack = _SLACK[dtype] * scale
        error, allowed = (ours[name].double() - exact).abs(), (base[name].double() - exact).abs()
        rms, rms_allowed = float(error.square().mean().sqrt()), float(allowed.square().mean().sqrt())
        assert rms <= _RMS * rms_allowed + slack, f"{name}: rms error {rms:.3g}, plain torch {rms_allowed:.3g}"
        worst, worst_allowed = float(error.max()), float(allowed.max())
        assert worst <= _MAX * worst_allowed + 4 * slack, f"{name}: error {worst:.3g}, plain torch {worst_allowed:.3g}"


def assert_equal_in_float64(
    op: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], inputs: Mapping[str, Any]
) -> None:
    """Assert that output and all gradients agree with ``reference`` to float64 rounding."""
    ours, truth = (outputs_and_grads(function, inputs, torch.float64) for function in (op, reference))
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        torch.testing.assert_close(
            ours[name], exact, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
