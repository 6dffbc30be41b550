"""Losses of rows of logits and their gradients as a Triton kernel: a program goes over one row twice.

Same function and arguments as ``cpu.py``, which has the formulas. The first pass keeps the running maximum and the sum
of exponentials (Milakov and Gimelshein 2018, arXiv:1805.02867); the second writes the gradient where the logits were,
rounded to their dtype. Nothing else of a row's size is made.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (A kernel's language is no typed Python, and triton is installed where there is a GPU only.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["row_losses_"]

# Logits that a program holds at once. Untuned.
_MOST_COLUMNS = 8192


@triton.jit
def _tanh(x):
    """Return tanh(x) to float32 rounding: a polynomial where 1 - exp(-2 x) would cancel."""
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * 62.0 / 2835.0))))
    shrunk = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _final(logits, logit_scale, softcap, HAS_CAP: tl.constexpr):
    """Return z = cap(scale * logits)."""
    result = logits.to(tl.float32) * logit_scale
    if HAS_CAP:
        result = softcap * _tanh(result / softcap)
    return result


@triton.jit
def _row_losses_kernel(
    logits,
    targets,
    losses,
    factor,
    logits_stride,
    classes,
    logit_scale,
    softcap,
    smoothing,
    HAS_CAP: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    FACTOR_ON_DEVICE: tl.constexpr,
    HAS_IDLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row n of logits (N, V), V = ``classes``; targets and losses (N,); grid (N,).

    ``factor`` is logit_scale / divisor, or points at it.
    """
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * logits_stride
    target = tl.load(targets + row)
    is_idle = target < 0
    if HAS_IDLE:
        target = tl.where(is_idle, 0, target)
    # Before any pass: the second one may overwrite it.
    chosen = _final(tl.load(here + target), logit_scale, softcap, HAS_CAP)
    # Finite, so that a block of nothing but -inf gives 0 and not NaN.
    highest = -3.0e38
    exponentials = 0.0
    everything = 0.0
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < classes
        z = _final(tl.load(here + column, mask=inside, other=0.0), logit_scale, softcap, HAS_CAP)
        everything += tl.sum(tl.where(inside, z, 0.0), 0)
        z = tl.where(inside, z, float("-inf"))
        raised = tl.maximum(highest, tl.max(z, 0))
        exponentials = exponentials * tl.exp(highest - raised) + tl.sum(tl.exp(z - raised), 0)
        highest = raised
    log_sum = highest + tl.log(exponentials)
    loss = log_sum - (1.0 - smoothing) * chosen
    if smoothing > 0.0:
        loss -= smoothing * (everything / classes)
    if HAS_IDLE:
        loss = tl.where(is_idle, 0.0, loss)
    tl.store(losses + row, loss)
    if WANT_GRAD:
        scale = tl.load(factor) if FACTOR_ON_DEVICE else factor
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < classes
            z = _final(tl.load(here + column, mask=inside, other=0.0), logit_scale, softcap, HAS_CAP)
            slope = tl.exp(z - log_sum) - smoothing / classes
            slope = tl.where(column == target, slope - (1.0 - smoothing), slope)
            if HAS_CAP:
                slope *= 1.0 - (z / softcap) * (z / softcap)
            slope *= scale
            if HAS_IDLE:
                # Chosen, not multiplied: 0 times what a broken row may hold would be NaN.
                slope = tl.where(is_idle, 0.0, slope)
            tl.store(here + column, slope.to(logits.dtype.element_ty), mask=inside)


def row_losses_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    divisor: float | torch.Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    want_grad: bool,
    has_idle: bool = False,
) -> torch.Tensor:
    """Return the losses (N,), not divided and in float32, of ``logits`` (N, V), which may be overwritten.

    With ``want_grad`` the gradient of the raw logits, divided by ``divisor``, is left in ``logits``, rounded to their
    dtype. With ``has_idle`` targets below 0 are of rows without a loss and a gradient.
    """
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    on_device = isinstance(divisor, torch.Tensor)
    # A divisor on the device stays there: reading it would wait for all the work before.
    factor = logit_scale / (divisor.to(logits.device, torch.float32).reshape(1) if on_device else divisor)
    block = min(_MOST_COLUMNS, triton.next_power_of_2(classes))
    with torch.cuda.device_of(logits):
        _row_losses_kernel[(rows,)](
            logits, targets, losses, factor, logits.stride(0), classes,
            float(logit_scale), float(softcap or 0.0), float(label_smoothing),
            HAS_CAP=softcap is not None, WANT_GRAD=want_grad, FACTOR_ON_DEVICE=on_device,
            HAS_IDLE=has_idle, BLOCK=block, num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
    return losses
