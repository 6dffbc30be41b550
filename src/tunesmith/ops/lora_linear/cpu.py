"""Linear layers that read the same input, with their adapters, forward and backward as matrix products.

For projections i = 1..n with weights W_i (F_i, D), stacked to W (F, D), adapters A_i (R_i, D) and B_i (F_i, R_i):

    s = x [A_1; A_2; ...]^T        y_i = x W_i^T + scale_i s_i B_i^T + bias_i
    ds_i = scale_i dy_i B_i        dx = dy W + ds [A_1; A_2; ...]
    dA_i = ds_i^T x                dB_i = scale_i dy_i^T s_i        dW_i = dy_i^T x        dbias_i = sum dy_i

One product makes q, k and v (or gate and up), one more their low-rank inputs; the adapter's product is added in the
accumulator of the base's. With dropout each adapter sees its own x_i = x m_i, and dx gets (ds_i A_i) m_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tunesmith.ops.dispatch import primitives
from tunesmith.ops.quantized.weights import QuantizedWeight
from tunesmith.ops.scripted import scripted

__all__ = [
    "Multiplier",
    "Projection",
    "dense_shape",
    "forward",
    "input_gradient",
    "low_rank",
    "low_rank_gradient",
    "parameter_gradients",
    "write_out",
]


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear layer as it is in one call.

    Attributes:
        weight: (F, D) in the dtype that is computed in; a shape without values (meta) where it is ``quantized``, and
            the caller hands the values in as ``stacked``.
        bias: (F,) or None.
        a, b: (R, D) and (F, R), any floating dtype; None without an adapter.
        scale: multiplies the adapter.
        dropout: probability with which an entry of the adapter's input is zeroed.
        quantized: the weight in few bits, frozen.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    quantized: QuantizedWeight | None = None

    @property
    def rank(self) -> int:
        """R, or 0 without an adapter."""
        return 0 if self.a is None else self.a.shape[0]


class Multiplier(Protocol):
    """All weights (F, D) as something that multiplies by itself (``ops/float8``)."""

    def forward(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """Write y (T, F) of ``x`` (T, D) to ``out``."""
        ...

    def input_gradient(self, dy: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """Write dx (T, D) of ``dy`` (T, F) to ``out``."""
        ...


def forward(
    x: torch.Tensor,
    stacked: torch.Tensor | Multiplier | None,
    projections: Sequence[Projection],
    *,
    seeds: Sequence[int] = (),
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y (T, F) and s (T, R) of ``x`` (T, D).

    ``stacked`` is (F, D), all weights in one tensor or multiplier, or None where they lie apart. ``seeds`` has one
    number a projection, from which its dropout is drawn.
    """
    out = x.new_empty(len(x), sum(p.weight.shape[0] for p in projections)) if out is None else out
    s = low_rank(x, projections, seeds=seeds)
    if isinstance(stacked, torch.Tensor):
        torch.mm(x, stacked.t(), out=out)
    elif stacked is not None:
        stacked.forward(x, out=out)
    else:
        for p, rows, _ in _parts(projections):
            torch.mm(x, p.weight.t(), out=out[:, rows])
    _add_adapters(out, s, *_adapters(projections))
    for p, rows, _ in _parts(projections):
        if p.bias is not None:
            out[:, rows].add_(p.bias)
    return out, s


def low_rank(x: torch.Tensor, projections: Sequence[Projection], *, seeds: Sequence[int] = ()) -> torch.Tensor:
    """Return s (T, R), the inputs of the B matrices side by side."""
    s = x.new_empty(len(x), sum(p.rank for p in projections))
    if any(p.dropout for p in projections):
        for index, (p, _, columns) in enumerate(_parts(projections)):
            if p.a is not None:
                torch.mm(_dropped(x, p, seeds, index), p.a.to(x.dtype).t(), out=s[:, columns])
    elif s.shape[1]:
        torch.mm(x, _stack_a(projections, x.dtype).t(), out=s)
    return s


def low_rank_gradient(dy: torch.Tensor, projections: Sequence[Projection]) -> torch.Tensor:
    """Return ds (T, R) for the gradient ``dy`` (T, F) of the output."""
    ds = dy.new_empty(len(dy), sum(p.rank for p in projections))
    _through_b(dy, ds, *_adapters(projections))
    return ds


def input_gradient(
    dy: torch.Tensor,
    ds: torch.Tensor,
    stacked: torch.Tensor | Multiplier | None,
    projections: Sequence[Projection],
    *,
    seeds: Sequence[int] = (),
    out: torch.Tensor,
) -> torch.Tensor:
    """Write dx (T, D) to ``out`` and return it; ``ds`` is that of :func:`low_rank_gradient`."""
    if isinstance(stacked, torch.Tensor):
        torch.mm(dy, stacked, out=out)
    elif stacked is not None:
        stacked.input_gradient(dy, out=out)
    else:
        for index, (p, rows, _) in enumerate(_parts(projections)):
            torch.addmm(out, dy[:, rows], p.weight, beta=float(index > 0), out=out)
    if any(p.dropout for p in projections):
        for index, (p, _, columns) in enumerate(_parts(projections)):
            if p.a is not None:
                through = ds[:, columns] @ p.a.to(dy.dtype)
                out.add_(through.mul_(_mask(out, p, seeds, index)) if p.dropout else through)
    elif ds.shape[1]:
        out.addmm_(ds, _stack_a(projections, dy.dtype))
    return out


def parameter_gradients(
    dy: torch.Tensor,
    ds: torch.Tensor,
    x: torch.Tensor,
    s: torch.Tensor,
    projections: Sequence[Projection],
    *,
    seeds: Sequence[int] = (),
) -> list[dict[str, torch.Tensor]]:
    """Return a dictionary a projection with the gradients of those of weight, bias, a and b that require one."""
    found: list[dict[str, torch.Tensor]] = []
    # A CPU's matrix library takes 0.45x to 0.6x the time for dB^T = s^T dy and dA^T = x^T ds, turned afterwards.
    shared = any(p.a is not None and p.a.requires_grad for p in projections) and not any(p.dropout for p in projections)
    together = x.t() @ ds if shared else None
    for index, (p, rows, columns) in enumerate(_parts(projections)):
        grads: dict[str, torch.Tensor] = {}
        if p.weight.requires_grad:
            grads["weight"] = dy[:, rows].t() @ x
        if p.bias is not None and p.bias.requires_grad:
            grads["bias"] = dy[:, rows].sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(p.bias.dtype)
        if p.a is not None and p.a.requires_grad:
            turned = together[:, columns] if together is not None else _dropped(x, p, seeds, index).t() @ ds[:, columns]
            grads["a"] = turned.t().to(p.a.dtype, memory_format=torch.contiguous_format, copy=True)
        if p.b is not None and p.b.requires_grad:
            turned = s[:, columns].t() @ dy[:, rows]
            grads["b"] = turned.t().to(p.b.dtype, memory_format=torch.contiguous_format, copy=True).mul_(p.scale)
        found.append(grads)
    return found


def dense_shape(projections: Sequence[Projection]) -> tuple[int, int]:
    """Return the shape (F, D) of all weights stacked."""
    return sum(p.weight.shape[0] for p in projections), projections[0].weight.shape[1]


def write_out(projections: Sequence[Projection], out: torch.Tensor) -> None:
    """Write all weights, those in few bits as the numbers that they stand for, to ``out`` of :func:`dense_shape`."""
    dequantize = primitives("quantized", out).dequantize
    for p, rows, _ in _parts(projections):
        if p.quantized is None:
            out[rows].copy_(p.weight.detach())
        else:
            dequantize(p.quantized, out[rows])


def _parts(projections: Sequence[Projection]) -> list[tuple[Projection, slice, slice]]:
    """Return each projection with its columns of y and of s."""
    parts: list[tuple[Projection, slice, slice]] = []
    row = column = 0
    for p in projections:
        parts.append((p, slice(row, row + p.weight.shape[0]), slice(column, column + p.rank)))
        row, column = row + p.weight.shape[0], column + p.rank
    return parts


def _adapters(projections: Sequence[Projection]) -> tuple[list[torch.Tensor], list[int], list[float]]:
    """Return the B matrices, their first columns of y, and their scales."""
    given = [(p.b, rows.start, p.scale) for p, rows, _ in _parts(projections) if p.b is not None]
    return [b for b, _, _ in given], [start for _, start, _ in given], [scale for _, _, scale in given]


@scripted
def _add_adapters(
    y: torch.Tensor, s: torch.Tensor, given: list[torch.Tensor], starts: list[int], scales: list[float]
) -> None:
    """Add scale_i s_i B_i^T to the columns of ``y`` that belong to it."""
    column = 0
    for i, b in enumerate(given):
        rank = b.size(1)
        part = y[:, starts[i] : starts[i] + b.size(0)]
        part.addmm_(s[:, column : column + rank], b.to(y.dtype).t().contiguous(), alpha=scales[i])
        column += rank


@scripted
def _through_b(
    dy: torch.Tensor, ds: torch.Tensor, given: list[torch.Tensor], starts: list[int], scales: list[float]
) -> None:
    """Write scale_i dy_i B_i to the columns of ``ds`` that belong to it."""
    column = 0
    for i, b in enumerate(given):
        rank = b.size(1)
        part = ds[:, column : column + rank]
        # With beta 0 what is there is not read. The scale goes into the sum, before it is rounded.
        dy_part = dy[:, starts[i] : starts[i] + b.size(0)]
        torch.addmm(part, dy_part, b.to(dy.dtype), beta=0, alpha=scales[i], out=part)
        column += rank


def _stack_a(projections: Sequence[Projection], dtype: torch.dtype) -> torch.Tensor:
    given = [p.a for p in projections if p.a is not None]
    return given[0].to(dtype) if len(given) == 1 else torch.cat(given).to(dtype)


def _mask(x: torch.Tensor, p: Projection, seeds: Sequence[int], index: int) -> torch.Tensor:
    """Return (T, D) of 0 and 1 / (1 - dropout), the same for the same seed: drawn again in the backward, not kept."""
    generator = torch.Generator(x.device).manual_seed(seeds[index])
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        .bernoulli_(1 - p.dropout, generator=generator)
        .div_(1 - p.dropout)
    )


def _dropped(x: torch.Tensor, p: Projection, seeds: Sequence[int], index: int) -> torch.Tensor:
    return x * _mask(x, p, seeds, index) if p.dropout else x
