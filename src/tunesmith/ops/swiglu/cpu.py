"""Gated activations and their backward in plain torch, blocked over rows.

h = f(g) u        dg = dh u f'(g)        du = dh f(g)

silu: f(g) = g s with s = 1 / (1 + exp(-g)),  f'(g) = s (1 + g (1 - s))
gelu: f(g) = g (1 + t) / 2 with t = tanh(c (g + 0.044715 g^3)),
      f'(g) = (1 + t) / 2 + g (1 - t^2) c (1 + 3 * 0.044715 g^2) / 2, c = sqrt(2 / pi)

In 16 bits silu is computed by torch's own kernels, which widen within the registers and round after every step, as
transformers' layers do: widening whole blocks first took longer than the arithmetic.
"""

from __future__ import annotations

import math

import torch

from tunesmith.ops.rows import block_rows, row_blocks, wide_dtype
from tunesmith.ops.scripted import scripted

__all__ = ["backward", "forward"]

_C, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def forward(gate_up: torch.Tensor, *, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return act(gate) * up (T, F) of ``gate_up`` (T, 2F)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if out is None else out
    wide = wide_dtype(gate_up.dtype)
    if activation == "silu" and out.dtype.itemsize == 2:
        _forward_in_16_bits(gate_up, out, block_rows(width, out.itemsize))
        return out
    for part in row_blocks(rows, width, wide.itemsize):
        gate, up = gate_up[part, :width].to(wide), gate_up[part, width:]
        if activation == "silu":
            active = torch.nn.functional.silu(gate)
        else:
            active = torch.nn.functional.gelu(gate, approximate="tanh")
        out[part].copy_(active.mul_(up))
    return out


def backward(
    dh: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    activation: str,
    out: torch.Tensor | None = None,
    hidden_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return d(gate_up) (T, 2F); ``out`` may be ``gate_up`` itself. ``hidden_out`` (T, F) gets the forward's result."""
    rows, width = dh.shape
    out = torch.empty_like(gate_up) if out is None else out
    if activation == "silu" and out.dtype.itemsize == 2:
        _backward_in_16_bits(dh, gate_up, out, hidden_out, block_rows(width, out.itemsize))
        return out
    wide = wide_dtype(gate_up.dtype)
    slope_of = _silu if activation == "silu" else _gelu
    for part in row_blocks(rows, width, wide.itemsize):
        gate, up, grad = (x.to(wide) for x in (gate_up[part, :width], gate_up[part, width:], dh[part]))
        active, slope = slope_of(gate)
        if hidden_out is not None:
            torch.mul(active, up, out=hidden_out[part]) if hidden_out.dtype == wide else hidden_out[part].copy_(
                active * up
            )
        slope.mul_(up).mul_(grad)
        out[part, width:].copy_(active.mul_(grad))
        out[part, :width].copy_(slope)
    return out


@scripted
def _forward_in_16_bits(gate_up: torch.Tensor, out: torch.Tensor, step: int) -> None:
    rows, width = out.size(0), out.size(1)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        part = out[start:end]
        torch.ops.aten.silu(gate_up[start:end, :width], out=part)
        part.mul_(gate_up[start:end, width:])


@scripted
def _backward_in_16_bits(
    dh: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor, hidden_out: torch.Tensor | None, step: int
) -> None:
    rows, width = dh.size(0), dh.size(1)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        gate, up, grad = gate_up[start:end, :width], gate_up[start:end, width:], dh[start:end]
        active = torch.nn.functional.silu(gate)
        if hidden_out is not None:
            torch.mul(active, up, out=hidden_out[start:end])
        d_active = up * grad  # before ``out``, which may be ``gate_up``, is written
        torch.mul(active, grad, out=out[start:end, width:])
        torch.ops.aten.silu_backward(d_active, gate, grad_input=out[start:end, :width])


def _silu(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return f(g) and f'(g) as new tensors."""
    sigmoid = torch.sigmoid(gate)
    active = gate * sigmoid
    # s (1 + g - g s) = s + f (1 - s)
    slope = torch.addcmul(active, active, sigmoid, value=-1).add_(sigmoid)
    return active, slope


def _gelu(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return f(g) and f'(g) as new tensors."""
    square = gate * gate
    tanh = (square * _CUBIC).add_(1).mul_(gate).mul_(_C).tanh_()
    inner = square.mul_(3 * _CUBIC * _C).add_(_C)
    slope = inner.mul_(gate).mul_((tanh * tanh).neg_().add_(1)).add_(tanh).add_(1).mul_(0.5)
    active = tanh.add_(1).mul_(gate).mul_(0.5)
    return active, slope
