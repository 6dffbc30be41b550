"""Gated activations and their backward as Triton kernels: a program takes a piece of one row.

Same functions and arguments as ``cpu.py``. Both activations are the gate times a sigmoid, s(g) = 1 / (1 + exp(-i(g))):

silu: i(g) = g        gelu: i(g) = 2 c (g + 0.044715 g^3) with c = sqrt(2 / pi), since (1 + tanh(y)) / 2 = sigmoid(2 y)

so that f(g) = g s and f'(g) = s + g s (1 - s) i'(g), in float32 and rounded once.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (A kernel's language is no typed Python, and triton is installed where there is a GPU only.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["backward", "forward"]

# Columns of a program. Untuned.
_MOST_COLUMNS = 1024


@triton.jit
def _inner(gate, IS_SILU: tl.constexpr):
    """Return i(g); 2 c = 1.5957691216057308."""
    return gate if IS_SILU else 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)


@triton.jit
def _forward_kernel(
    gate_up, out, gate_up_stride, out_stride, width, IS_SILU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A piece of row t of gate_up (T, 2F) and out (T, F), F = ``width``; grid (T, F / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + width + column, mask=inside, other=0.0).to(tl.float32)
    hidden = gate * tl.sigmoid(_inner(gate, IS_SILU)) * up
    tl.store(out + row * out_stride + column, hidden.to(out.dtype.element_ty), mask=inside)


def forward(gate_up: torch.Tensor, *, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return act(gate) * up (T, F) of ``gate_up`` (T, 2F)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if out is None else out
    block = min(_MOST_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(gate_up):
        _forward_kernel[(rows, triton.cdiv(width, block))](
            gate_up,
            out,
            gate_up.stride(0),
            out.stride(0),
            width,
            IS_SILU=activation == "silu",
            BLOCK=block,
            num_warps=4,
        )
    return out


@triton.jit
def _backward_kernel(
    dh,
    gate_up,
    out,
    hidden,
    dh_stride,
    gate_up_stride,
    out_stride,
    hidden_stride,
    width,
    IS_SILU: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of row t of dh and hidden (T, F), gate_up and out (T, 2F), F = ``width``; grid (T, F / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(dh + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(_inner(gate, IS_SILU))
    active = gate * sigmoid
    if IS_SILU:
        slope = sigmoid + active * (1.0 - sigmoid)
    else:
        slope = sigmoid + active * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * gate * gate)
    # Each value is read and written by one thread: ``out`` may lie on gate_up, ``hidden`` on dh.
    if HAS_HIDDEN:
        tl.store(hidden + row * hidden_stride + column, (active * up).to(hidden.dtype.element_ty), mask=inside)
    tl.store(out + row * out_stride + column, (grad * up * slope).to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * out_stride + width + column, (grad * active).to(out.dtype.element_ty), mask=inside)


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
    out = gate_up.new_empty(rows, 2 * width) if out is None else out
    hidden = dh if hidden_out is None else hidden_out
    block = min(_MOST_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(gate_up):
        _backward_kernel[(rows, triton.cdiv(width, block))](
            dh, gate_up, out, hidden, dh.stride(0), gate_up.stride(0), out.stride(0), hidden.stride(0), width,
            IS_SILU=activation == "silu", HAS_HIDDEN=hidden_out is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
