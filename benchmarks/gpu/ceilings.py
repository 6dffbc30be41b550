"""What the device can do at most - copies, matrix products, attention - and how near the kernels come to it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.stage import Stage, seconds_of

__all__ = ["run"]

# Llama 3.1 8B: tokens, hidden, ffn, heads, key heads, head size, vocabulary, rows of a chunk of logits.
_SHAPE = (8192, 4096, 14336, 32, 8, 128, 128256, 128)
_DRY_SHAPE = (32, 16, 24, 4, 2, 8, 301, 16)


def run(stage: Stage) -> None:
    """Record each figure as ``gb_per_s`` or ``tflops``, from the median of some repetitions."""
    _copies(stage)
    _products(stage)
    _attention(stage)
    _kernels(stage)


def _measure(stage: Stage, name: str, call: Callable[[], Any], *, nbytes: float = 0.0, flops: float = 0.0) -> None:
    try:
        seconds = seconds_of(
            call, repetitions=2 if stage.is_dry else 20, device=stage.device, warmup=1 + 2 * (not stage.is_dry)
        )
    # A backend that refuses says why; the figures of the others stand.
    except Exception as error:
        stage.record(what=name, refused=f"{type(error).__name__}: {str(error)[:300]}")
        return
    rates = {"gb_per_s": nbytes / seconds["p50"] / 1e9} if nbytes else {}
    rates |= {"tflops": flops / seconds["p50"] / 1e12} if flops else {}
    stage.record(what=name, seconds=seconds, **rates)


def _draw(stage: Stage, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    # Random: zeros take less power, and clock higher.
    return torch.randn(shape, device=stage.device).to(dtype)


def _copies(stage: Stage) -> None:
    size = 2**16 if stage.is_dry else 2**30
    source = torch.ones(size, dtype=torch.uint8, device=stage.device)
    target = torch.empty_like(source)
    _measure(stage, "copy, read and written", lambda: target.copy_(source), nbytes=2 * size)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=not stage.is_dry)
    _measure(stage, "to pinned host memory", lambda: pinned.copy_(source, non_blocking=True), nbytes=size)
    _measure(stage, "from pinned host memory", lambda: target.copy_(pinned, non_blocking=True), nbytes=size)


def _products(stage: Stage) -> None:
    tokens, hidden, ffn, *_ = _DRY_SHAPE if stage.is_dry else _SHAPE
    square = 64 if stage.is_dry else 8192
    for name, (rows, inner, columns) in {
        "product of squares": (square, square, square),
        "gate and up": (tokens, hidden, 2 * ffn),
        "down": (tokens, ffn, hidden),
        "low-rank input": (tokens, hidden, 64),
    }.items():
        x, w = _draw(stage, rows, inner), _draw(stage, columns, inner)
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
        shape = f"{name}, {rows}x{inner} by {inner}x{columns}"
        _measure(
            stage, shape, lambda x=x, w=w, out=out: torch.mm(x, w.t(), out=out), flops=2.0 * rows * inner * columns
        )


def _attention(stage: Stage) -> None:
    tokens, _, _, heads, key_heads, size, *_ = _DRY_SHAPE if stage.is_dry else _SHAPE
    kernels = importlib.import_module(f"tunesmith.ops.attention_varlen.{'cpu' if stage.is_dry else 'cuda'}")
    short = tokens // 16
    whole = _draw(stage, tokens, heads + 2 * key_heads, size)
    query, key, value = whole.split((heads, key_heads, key_heads), dim=1)
    dout, grads = _draw(stage, tokens, heads, size), torch.empty_like(whole)
    targets = dict(zip(("dquery", "dkey", "dvalue"), grads.split((heads, key_heads, key_heads), dim=1), strict=True))
    settings: dict[str, Any] = {"scale": size**-0.5, "window": None, "softcap": None}
    for name, lengths in {"one document": (tokens,), "16 documents": (short,) * 16}.items():
        # Two products forward and five backward, over half of each square, 2 FLOP each.
        work = 2.0 * heads * size * sum(length * length / 2 for length in lengths)
        out, kept = kernels.forward(query, key, value, lengths, **settings)
        _measure(stage, f"attention of ours forward, {name}",
                 lambda lengths=lengths: kernels.forward(query, key, value, lengths, **settings),
                 flops=2 * work)  # fmt: skip
        _measure(stage, f"attention of ours backward, {name}",
                 lambda lengths=lengths, out=out, kept=kept: kernels.backward(
                     dout, query, key, value, out, kept, lengths, **settings, **targets
                 ), flops=5 * work)  # fmt: skip
    # As many heads everywhere: not every backend shares them.
    group = heads // key_heads
    alike = (query, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1))
    dense = [x.transpose(0, 1)[None].contiguous().requires_grad_() for x in alike]
    dense_grad, work = dout.transpose(0, 1)[None].contiguous(), 2.0 * heads * size * tokens * tokens / 2
    backends = (SDPBackend.MATH,) if stage.is_dry else (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    for backend in backends:

        def attend(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=True)

        name = backend.name.lower()
        _measure(stage, f"attention of torch forward, {name}, one document", attend, flops=2 * work)
        _measure(stage, f"attention of torch forward and backward, {name}, one document",
                 lambda attend=attend: torch.autograd.grad(attend(), dense, dense_grad), flops=7 * work)  # fmt: skip


def _kernels(stage: Stage) -> None:
    """Bytes are those that have to be read and written at least."""
    tokens, hidden, ffn, heads, key_heads, size, classes, rows = _DRY_SHAPE if stage.is_dry else _SHAPE
    implementation = "cpu" if stage.is_dry else "triton"
    norm, rope, gate, losses = (
        importlib.import_module(f"tunesmith.ops.{op}.{implementation}")
        for op in ("rms_norm", "rope", "swiglu", "linear_cross_entropy")
    )
    x, h, weight = _draw(stage, tokens, hidden), _draw(stage, tokens, hidden), _draw(stage, hidden)
    one = x.numel() * x.itemsize
    _, _, rstd = norm.forward(x, weight, eps=1e-5, offset=0.0)
    _measure(stage, "rms_norm forward", lambda: norm.forward(x, weight, eps=1e-5, offset=0.0, out=h), nbytes=2 * one)
    _measure(stage, "rms_norm backward with residual",
             lambda: norm.backward(h, x, weight, rstd, offset=0.0, dresidual=x, out=h), nbytes=4 * one)  # fmt: skip
    _measure(stage, "rms_norm weight gradient", lambda: norm.weight_gradient(h, x, rstd), nbytes=2 * one)
    gate_up, hidden_out = _draw(stage, tokens, 2 * ffn), _draw(stage, tokens, ffn)
    grad, one = torch.empty_like(gate_up), hidden_out.numel() * hidden_out.itemsize
    _measure(stage, "swiglu forward", lambda: gate.forward(gate_up, activation="silu", out=hidden_out), nbytes=3 * one)
    _measure(stage, "swiglu backward",
             lambda: gate.backward(hidden_out, gate_up, activation="silu", out=grad, hidden_out=hidden_out),
             nbytes=6 * one)  # fmt: skip
    qkv, table = _draw(stage, tokens, heads + 2 * key_heads, size), _draw(stage, tokens, size)
    turning, one = qkv[:, : heads + key_heads], tokens * (heads + key_heads) * size * qkv.itemsize
    _measure(stage, "rotate", lambda: rope.rotate_(turning, table, table), nbytes=2 * one)
    out, head_weight = torch.empty_like(turning), _draw(stage, size)
    _measure(stage, "norm_rotate",
             lambda: rope.norm_rotate(turning, head_weight, table, table, eps=1e-6, offset=0.0, out=out),
             nbytes=2 * one)  # fmt: skip
    logits, targets = _draw(stage, rows, classes), torch.zeros(rows, dtype=torch.long, device=stage.device)
    settings: dict[str, Any] = {"logit_scale": 1.0, "softcap": None, "label_smoothing": 0.0, "want_grad": True}
    # Read twice: a row does not fit into a program.
    _measure(stage, f"row losses, {rows} rows",
             lambda: losses.row_losses_(logits, targets, 1.0, **settings),
             nbytes=3 * logits.numel() * logits.itemsize)  # fmt: skip
