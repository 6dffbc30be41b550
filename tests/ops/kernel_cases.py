"""Calls of the ops' forward and backward primitives, each beside plain torch: which every implementation must equal.

Used by ``test_triton.py`` (kernels, interpreted or on a GPU), by ``test_primitives.py`` (plain torch on a CPU) and by
``benchmarks.gpu_check``, so that all of them ask the same. ``compare(case, implementation, ...)`` returns the errors of
each result against float64, beside those of plain torch that computes in float32 and rounds once (attention: in 16
bits throughout, as transformers' eager attention does).

Inputs and results lie in rows with NaN behind them, and results are NaN before: what is read or written outside its
rows, or not written at all, shows.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

__all__ = ["CASES", "EQUAL_DOCUMENTS", "Case", "Comparison", "Memory", "cases_at", "compare"]

# As in ``tests/numerics.py``: right answers differ in rounding. Slack relative to the largest value; float32 allows for
# a GPU's exp and rsqrt, which are good to two units in the last place.
_RMS, _MAX = 1.1, 2.0
_SLACK = {torch.float32: 5e-7, torch.bfloat16: 2e-4, torch.float16: 3e-5}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Errors of one result."""

    result: str
    rms: float
    rms_allowed: float
    worst: float
    worst_allowed: float

    @property
    def passes(self) -> bool:
        """Whether the result is as accurate as plain torch."""
        return self.rms <= self.rms_allowed and self.worst <= self.worst_allowed

    def __str__(self) -> str:
        """Return both errors beside what is allowed."""
        return (
            f"{self.result}: rms error {self.rms:.3g} (allowed {self.rms_allowed:.3g}), "
            f"worst {self.worst:.3g} ({self.worst_allowed:.3g})"
        )


@dataclass
class Memory:
    """Makes tensors whose last two axes are rows with NaN between them, and looks whether the NaN are still there."""

    dtype: torch.dtype
    device: str
    seed: int
    _bases: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start the random numbers."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def empty(self, *shape: int, pad: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return NaN; each row is followed by ``pad`` more values."""
        base = torch.full((*shape[:-1], shape[-1] + pad), math.nan, dtype=dtype or self.dtype, device=self.device)
        self._bases.append((base, shape[-1]))
        return base[..., : shape[-1]]

    def draw(self, *shape: int, pad: int = 0, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        """Return normal numbers in such rows."""
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return self.empty(*shape, pad=pad, dtype=dtype).copy_(numbers)

    def integers(self, below: int, count: int) -> torch.Tensor:
        """Return int64 in [0, below)."""
        return torch.randint(below, (count,), generator=self.generator).to(self.device)

    def assert_untouched(self) -> None:
        """Assert that nothing was written behind a row."""
        assert all(bool(base[..., size:].isnan().all()) for base, size in self._bases), "written behind a row"


@dataclass(frozen=True, slots=True)
class Case:
    """One call.

    Attributes:
        op: the folder under ``tunesmith.ops``.
        inputs: makes the inputs; what is no tensor is passed on.
        call: runs the primitive, given the module of an implementation, the inputs and the memory of the results.
        plain: the same in plain torch, in the dtype of its inputs.
        changes: inputs that the call may change.
        rounds: whether plain torch is to compute in the dtype of the inputs all the way.
    """

    op: str
    name: str
    inputs: Callable[[Memory], dict[str, Any]]
    call: Callable[[Any, dict[str, Any], Memory], Tensors]
    plain: Callable[[dict[str, Any]], Tensors]
    changes: tuple[str, ...] = ()
    rounds: bool = False


def compare(
    case: Case, implementation: str, dtype: torch.dtype, device: str = "cpu", *, seed: int = 0
) -> list[Comparison]:
    """Run ``case`` and return the errors of all results.

    Raises:
        AssertionError: an input was changed that may not be, or something was written outside a row.
    """
    memory = Memory(dtype, device, seed)
    inputs = case.inputs(memory)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    before = {name: value.clone() for name, value in tensors.items()}
    truth, base = (
        case.plain({**inputs, **{k: v.to(wide) if v.is_floating_point() else v for k, v in before.items()}})
        for wide in (torch.float64, dtype if case.rounds else torch.float32)
    )
    found = case.call(importlib.import_module(f"tunesmith.ops.{case.op}.{implementation}"), inputs, memory)
    memory.assert_untouched()
    for name, value in tensors.items():
        assert name in case.changes or torch.equal(value, before[name]), f"{name} was changed"
    assert found.keys() == truth.keys()
    return [_compare(name, found[name], exact, base[name]) for name, exact in truth.items()]


def _compare(name: str, found: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> Comparison:
    assert found.shape == exact.shape, f"{name}: {tuple(found.shape)} instead of {tuple(exact.shape)}"
    if not found.numel():
        return Comparison(name, 0.0, 0.0, 0.0, 0.0)
    slack = _SLACK[found.dtype] * (float(exact.abs().max()) + 1e-30)
    error, usual = (found.double() - exact).abs(), (plain.to(found.dtype).double() - exact).abs()
    rms, rms_usual = (float(x.square().mean().sqrt()) for x in (error, usual))
    return Comparison(name, rms, _RMS * rms_usual + slack, float(error.max()), _MAX * float(usual.max()) + 4 * slack)


# ---- rms_norm ----

EPS = 1e-5


def _norm_inputs(
    rows: int, width: int, memory: Memory, *, pad: int = 0, wide_weight: bool = False, **more: bool
) -> dict[str, Any]:
    """``more`` names other tensors of the shape of x."""
    return {
        "x": memory.draw(rows, width, pad=pad),
        "weight": memory.draw(width, dtype=torch.float32 if wide_weight else None),
        "dtype": memory.dtype,
        **{name: memory.draw(rows, width, pad=2 * pad) for name, wanted in more.items() if wanted},
    }


def _norm(module: Any, given: dict[str, Any], memory: Memory, *, offset: float, pad: int) -> Tensors:
    out, residual = memory.empty(*given["x"].shape, pad=pad), given.get("residual")
    h, total, rstd = module.forward(given["x"], given["weight"], eps=EPS, offset=offset, residual=residual, out=out)
    assert h.data_ptr() == out.data_ptr()
    assert residual is not None or total is given["x"]
    return {"h": h, "total": total, "rstd": rstd}


def _plain_norm(given: dict[str, Any], *, offset: float) -> Tensors:
    x, weight = given["x"], given["weight"]
    # The sum is kept for the backward, so the norm is that of the rounded sum.
    total = (x + given["residual"]).to(given["dtype"]).to(x.dtype) if "residual" in given else x
    rstd = torch.rsqrt(total.square().mean(-1) + EPS)
    return {"h": total * rstd[:, None] * (weight + offset), "total": total, "rstd": rstd}


def _rstd(x: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(x.double().square().mean(-1) + EPS).float()


def _norm_backward(module: Any, given: dict[str, Any], memory: Memory, *, offset: float, pad: int, out: str) -> Tensors:
    target = given[out] if out else memory.empty(*given["x"].shape, pad=pad)
    found = module.backward(
        given["dh"], given["x"], given["weight"], _rstd(given["x"]), offset=offset,
        dresidual=given.get("dresidual"), out=target,
    )  # fmt: skip
    assert found.data_ptr() == target.data_ptr()
    return {"dx": found}


def _plain_norm_backward(given: dict[str, Any], *, offset: float) -> Tensors:
    x = given["x"].clone().requires_grad_()
    h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (given["weight"] + offset)
    (dx,) = torch.autograd.grad(h, x, given["dh"])
    return {"dx": dx + given["dresidual"] if "dresidual" in given else dx}


def _norm_weight(module: Any, given: dict[str, Any], memory: Memory) -> Tensors:
    return {"dweight": module.weight_gradient(given["dh"], given["x"], _rstd(given["x"]))}


def _plain_norm_weight(given: dict[str, Any]) -> Tensors:
    x = given["x"]
    return {"dweight": (given["dh"] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)).sum(0)}


def _norm_cases(rows: int, width: int, *, pad: int = 0, offset: float = 0.0, residual: bool = False) -> Iterator[Case]:
    shape = f"{rows}x{width}" + (f", rows {pad} apart" if pad else "") + (", with residual" if residual else "")
    inputs = partial(_norm_inputs, rows, width, pad=pad, wide_weight=bool(offset))
    yield Case("rms_norm", f"rms_norm forward {shape}", lambda m: inputs(m, residual=residual),
               partial(_norm, offset=offset, pad=pad), partial(_plain_norm, offset=offset))  # fmt: skip
    yield Case("rms_norm", f"rms_norm backward {shape}", lambda m: inputs(m, dh=True, dresidual=residual),
               partial(_norm_backward, offset=offset, pad=pad, out=""),
               partial(_plain_norm_backward, offset=offset))  # fmt: skip
    yield Case("rms_norm", f"rms_norm weight gradient {shape}", lambda m: inputs(m, dh=True),
               _norm_weight, _plain_norm_weight)  # fmt: skip


def _norm_aliases() -> Iterator[Case]:
    for name in ("dh", "dresidual"):
        yield Case("rms_norm", f"rms_norm backward over {name}",
                   lambda m: _norm_inputs(7, 1300, m, pad=3, dh=True, dresidual=True),
                   partial(_norm_backward, offset=0.0, pad=0, out=name),
                   partial(_plain_norm_backward, offset=0.0), changes=(name,))  # fmt: skip


# ---- rope ----


def _tables(memory: Memory, tokens: int, rotated: int, *, pad: int, scale: float = 1.0) -> Tensors:
    """Both halves alike, as transformers makes them; ``scale`` is the attention factor of YaRN."""
    angles = torch.arange(tokens)[:, None] * 10_000.0 ** -torch.linspace(0, 1, rotated // 2)
    angles = torch.cat([angles, angles], dim=1).double()
    return {
        "cos": memory.empty(tokens, rotated, pad=pad).copy_(angles.cos() * scale),
        "sin": memory.empty(tokens, rotated, pad=pad).copy_(angles.sin() * scale),
    }


def _rope_inputs(
    memory: Memory,
    *,
    tokens: int,
    heads: int,
    size: int,
    rotated: int,
    pad: int,
    norm: bool = False,
    grad: bool = False,
) -> dict[str, Any]:
    # Heads of query, key and value beside each other, of which some are taken.
    more = {"heads": memory.draw(tokens, heads + 2, size, pad=pad)[:, 1 : heads + 1]}
    if norm:
        more["weight"] = memory.draw(size)
    if grad:
        more["dout"] = memory.draw(tokens, heads, size, pad=pad)
    return {**more, **_tables(memory, tokens, rotated, pad=pad, scale=1.2 if pad else 1.0)}


def _rotate(module: Any, given: dict[str, Any], memory: Memory, *, inverse: bool) -> Tensors:
    assert module.rotate_(given["heads"], given["cos"], given["sin"], inverse=inverse) is None
    return {"heads": given["heads"]}


def _turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    size = cos.shape[-1]
    first, second = heads[..., : size // 2], heads[..., size // 2 : size]
    cos, sin = cos[:, None, : size // 2], sin[:, None, : size // 2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, heads[..., size:]], dim=-1)


def _plain_rotate(given: dict[str, Any], *, inverse: bool) -> Tensors:
    return {"heads": _turned(given["heads"], given["cos"], -given["sin"] if inverse else given["sin"])}


def _norm_rotate(module: Any, given: dict[str, Any], memory: Memory, *, offset: float, pad: int) -> Tensors:
    out = memory.empty(*given["heads"].shape, pad=pad)
    rstd = module.norm_rotate(
        given["heads"], given["weight"], given["cos"], given["sin"], eps=EPS, offset=offset, out=out
    )
    return {"out": out, "rstd": rstd}


def _plain_norm_rotate(given: dict[str, Any], *, offset: float) -> Tensors:
    heads = given["heads"]
    rstd = torch.rsqrt(heads.square().mean(-1) + EPS)
    normed = heads * rstd[..., None] * (given["weight"] + offset)
    return {"out": _turned(normed, given["cos"], given["sin"]), "rstd": rstd}


def _norm_rotate_backward(
    module: Any, given: dict[str, Any], memory: Memory, *, offset: float, pad: int, in_place: bool, weight: bool
) -> Tensors:
    heads = given["heads"]
    out = given["dout"] if in_place else memory.empty(*heads.shape, pad=pad)
    dweight = torch.ones(heads.shape[-1], dtype=torch.float32, device=heads.device) if weight else None
    found = module.norm_rotate_backward(
        given["dout"], heads, given["weight"], _rstd(heads), given["cos"], given["sin"], offset=offset, out=out,
        dweight=dweight,
    )  # fmt: skip
    assert found.data_ptr() == out.data_ptr()
    return {"dheads": found, **({} if dweight is None else {"dweight": dweight})}


def _plain_norm_rotate_backward(given: dict[str, Any], *, offset: float, weight: bool) -> Tensors:
    leaves = [given[name].clone().requires_grad_() for name in ("heads", "weight")]
    normed = leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + EPS) * (leaves[1] + offset)
    dheads, dweight = torch.autograd.grad(_turned(normed, given["cos"], given["sin"]), leaves, given["dout"])
    return {"dheads": dheads, **({"dweight": dweight + 1} if weight else {})}  # It is added to.


def _rope_cases(
    tokens: int, heads: int, size: int, rotated: int, *, pad: int = 0, offset: float = 0.0
) -> Iterator[Case]:
    shape = f"{tokens}x{heads}x{size}" + (f", {rotated} rotated" if rotated < size else "")
    inputs = partial(_rope_inputs, tokens=tokens, heads=heads, size=size, rotated=rotated, pad=pad)
    for inverse in (False, True):
        yield Case("rope", f"rotate{' back' * inverse} {shape}", inputs, partial(_rotate, inverse=inverse),
                   partial(_plain_rotate, inverse=inverse), changes=("heads",))  # fmt: skip
    # Plain torch rounds between norm and rotation, the kernels do not.
    yield Case("rope", f"norm_rotate {shape}", partial(inputs, norm=True),
               partial(_norm_rotate, offset=offset, pad=pad), partial(_plain_norm_rotate, offset=offset))  # fmt: skip
    for in_place, weight in ((False, True), (True, False)):
        name = f"norm_rotate backward {shape}{' in place' * in_place}{' with weight' * weight}"
        yield Case("rope", name, partial(inputs, norm=True, grad=True),
                   partial(_norm_rotate_backward, offset=offset, pad=pad, in_place=in_place, weight=weight),
                   partial(_plain_norm_rotate_backward, offset=offset, weight=weight),
                   changes=("dout",) if in_place else ())  # fmt: skip


# ---- float8 ----


def _row_inputs(rows: int, width: int, memory: Memory, *, pad: int, scaled: bool) -> dict[str, Any]:
    """Rows of numbers that float8 has, times powers of two: then every right answer is the input itself."""
    numbers = torch.randint(127, (rows, width), generator=memory.generator, dtype=torch.uint8)
    signs = 1 - 2 * torch.randint(2, (rows, width), generator=memory.generator)
    numbers = numbers.view(torch.float8_e4m3fn).double() * signs
    numbers[:, -1] = 448.0  # the largest, so that the scale is a power of two as well
    numbers *= 2.0 ** torch.randint(-3, 4, (rows, 1), generator=memory.generator)
    numbers[rows // 2] = 0.0
    factor = 2.0 ** torch.randint(-1, 2, (width,), generator=memory.generator)
    x = memory.empty(rows, width, pad=pad).copy_(numbers / factor if scaled else numbers)
    return {"x": x, **({"factor": factor.float().to(x.device)} if scaled else {})}


def _rows_in_float8(module: Any, given: dict[str, Any], memory: Memory, *, pad: int) -> Tensors:
    rows, width = given["x"].shape
    held = torch.full((rows, width + pad), 0x7F, dtype=torch.uint8, device=given["x"].device)
    scales = module.quantize_rows(given["x"], given.get("factor"), held.view(torch.float8_e4m3fn)[:, :width])
    assert bool((held[:, width:] == 0x7F).all()), "written behind a row"
    return {"values": held[:, :width].view(torch.float8_e4m3fn).float() * scales, "scales": scales}


def _plain_rows(given: dict[str, Any]) -> Tensors:
    values = given["x"] * given.get("factor", 1.0)
    scales = values.abs().amax(1, keepdim=True) / 448
    return {"values": values, "scales": torch.where(scales > 0, scales, 1.0)}


def _row_cases(rows: int, width: int, *, pad: int = 0) -> Iterator[Case]:
    for scaled in (False, True):
        yield Case("float8", f"float8 rows {rows}x{width}{', with factors' * scaled}",
                   partial(_row_inputs, rows, width, pad=pad, scaled=scaled), partial(_rows_in_float8, pad=pad),
                   _plain_rows)  # fmt: skip


# ---- swiglu ----


def _gate_inputs(rows: int, width: int, memory: Memory, *, pad: int, grad: bool) -> dict[str, Any]:
    given = {"gate_up": memory.draw(rows, 2 * width, pad=pad, scale=3.0)}
    return {**given, "dh": memory.draw(rows, width, pad=pad)} if grad else given


def _gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def _gate(module: Any, given: dict[str, Any], memory: Memory, *, activation: str, pad: int) -> Tensors:
    gate_up = given["gate_up"]
    out = memory.empty(len(gate_up), gate_up.shape[1] // 2, pad=pad)
    found = module.forward(gate_up, activation=activation, out=out)
    assert found.data_ptr() == out.data_ptr()
    return {"hidden": found}


def _gate_backward(
    module: Any, given: dict[str, Any], memory: Memory, *, activation: str, pad: int, in_place: bool, hidden: bool
) -> Tensors:
    gate_up, dh = given["gate_up"], given["dh"]
    out = gate_up if in_place else memory.empty(*gate_up.shape, pad=pad)
    hidden_out = memory.empty(*dh.shape, pad=pad) if hidden else None
    found = module.backward(dh, gate_up, activation=activation, out=out, hidden_out=hidden_out)
    assert found.data_ptr() == out.data_ptr()
    return {"d_gate_up": found, **({} if hidden_out is None else {"hidden": hidden_out})}


def _plain_gate_backward(given: dict[str, Any], *, activation: str, hidden: bool) -> Tensors:
    leaf = given["gate_up"].clone().requires_grad_()
    made = _gated(leaf, activation)
    (grad,) = torch.autograd.grad(made, leaf, given["dh"])
    return {"d_gate_up": grad, **({"hidden": made.detach()} if hidden else {})}


def _gate_cases(rows: int, width: int, activation: str, *, pad: int = 0) -> Iterator[Case]:
    shape = f"{activation} {rows}x{width}"
    yield Case("swiglu", f"swiglu forward {shape}", lambda m: _gate_inputs(rows, width, m, pad=pad, grad=False),
               partial(_gate, activation=activation, pad=pad),
               lambda given: {"hidden": _gated(given["gate_up"], activation)})  # fmt: skip
    for in_place in (False, True):
        yield Case("swiglu", f"swiglu backward {shape}{' in place' * in_place}",
                   lambda m: _gate_inputs(rows, width, m, pad=pad, grad=True),
                   partial(_gate_backward, activation=activation, pad=pad, in_place=in_place, hidden=in_place),
                   partial(_plain_gate_backward, activation=activation, hidden=in_place),
                   changes=("gate_up",) if in_place else ())  # fmt: skip


# ---- linear_cross_entropy ----


@dataclass(frozen=True, slots=True)
class _Loss:
    """A head as ``row_losses_`` takes it."""

    rows: int
    classes: int
    pad: int = 0
    logit_scale: float = 1.0
    softcap: float | None = None
    smoothing: float = 0.0
    divisor: float = 1.0
    divisor_on_device: bool = False
    want_grad: bool = True
    rounded: bool = False
    size: float = 3.0
    has_idle: bool = False

    def inputs(self, memory: Memory) -> dict[str, Any]:
        """Logits are float32, or ``rounded`` to the dtype. Every second row is idle, if any are."""
        targets = memory.integers(self.classes, self.rows)
        if self.has_idle:
            targets[::2] = -100
        return {
            "logits": memory.draw(
                self.rows, self.classes, pad=self.pad, dtype=None if self.rounded else torch.float32, scale=self.size
            ),
            "targets": targets,
        }

    def call(self, module: Any, given: dict[str, Any], memory: Memory) -> Tensors:
        """Run the primitive."""
        logits, divisor = given["logits"], self.divisor
        losses = module.row_losses_(
            logits, given["targets"],
            torch.tensor(divisor, device=logits.device) if self.divisor_on_device else divisor,
            logit_scale=self.logit_scale, softcap=self.softcap, label_smoothing=self.smoothing,
            want_grad=self.want_grad, has_idle=self.has_idle,
        )  # fmt: skip
        return {"losses": losses, **({"grad": logits} if self.want_grad else {})}

    def plain(self, given: dict[str, Any]) -> Tensors:
        """The same through torch's own cross-entropy."""
        logits, targets = given["logits"].clone().requires_grad_(), given["targets"]
        final = logits * self.logit_scale
        final = final if self.softcap is None else self.softcap * torch.tanh(final / self.softcap)
        losses = torch.nn.functional.cross_entropy(final, targets, reduction="none", label_smoothing=self.smoothing)
        if not self.want_grad:
            return {"losses": losses.detach()}
        (grad,) = torch.autograd.grad(losses.sum() / self.divisor, logits)
        return {"losses": losses.detach(), "grad": grad}


_LOSSES = {
    "one row": _Loss(1, 31),
    "one class": _Loss(5, 1),
    "odd": _Loss(42, 431, pad=3),
    "several blocks": _Loss(3, 20_011),
    "a whole block": _Loss(2, 8192),
    "scale and divisor": _Loss(7, 123, logit_scale=0.25, divisor=123.0),
    "divisor on the device": _Loss(7, 123, divisor=17.0, divisor_on_device=True),
    "softcap": _Loss(7, 431, softcap=1.5),
    "softcap of small logits": _Loss(7, 431, softcap=30.0, size=0.05),
    "smoothing": _Loss(7, 431, smoothing=0.1),
    "large logits": _Loss(7, 431, size=1e4),
    "everything": _Loss(9, 431, pad=1, logit_scale=3.0, softcap=2.0, smoothing=0.2, divisor=9.0, rounded=True),
    "no gradient": _Loss(9, 431, want_grad=False, softcap=2.0, smoothing=0.2),
    "rounded": _Loss(6, 431, rounded=True, pad=5),
    "no rows": _Loss(0, 31),
    "idle rows": _Loss(7, 431, has_idle=True, divisor=17.0, divisor_on_device=True),
    "idle rows, everything": _Loss(
        9, 431, pad=1, logit_scale=3.0, softcap=2.0, smoothing=0.2, rounded=True, has_idle=True
    ),
}


def _loss_cases() -> Iterator[Case]:
    for name, loss in _LOSSES.items():
        yield Case("linear_cross_entropy", f"row losses, {name}", loss.inputs, loss.call, loss.plain, ("logits",))


# ---- attention_varlen ----


def _attention_inputs(
    memory: Memory, *, lengths: tuple[int, ...], heads: int, key_heads: int, size: int, pad: int
) -> dict[str, Any]:
    whole = memory.draw(sum(lengths), heads + 2 * key_heads, size, pad=pad)
    query, key, value = whole.split((heads, key_heads, key_heads), dim=1)
    return {"query": query, "key": key, "value": value, "dout": memory.draw(sum(lengths), heads, size)}


def _attention(
    module: Any, given: dict[str, Any], memory: Memory, *, lengths: tuple[int, ...], settings: dict[str, Any]
) -> Tensors:
    query, key, value, dout = (given[name] for name in ("query", "key", "value", "dout"))
    out = memory.empty(*query.shape)
    grads = memory.empty(len(query), query.shape[1] + 2 * key.shape[1], query.shape[2])
    dquery, dkey, dvalue = grads.split((query.shape[1], key.shape[1], key.shape[1]), dim=1)
    found, kept = module.forward(query, key, value, lengths, **settings, out=out)
    assert found.data_ptr() == out.data_ptr()
    module.backward(
        dout, query, key, value, out, kept, lengths, **settings, dquery=dquery, dkey=dkey, dvalue=dvalue
    )  # fmt: skip
    return {"out": out, "dquery": dquery, "dkey": dkey, "dvalue": dvalue}


def _plain_attention(given: dict[str, Any], *, lengths: tuple[int, ...], settings: dict[str, Any]) -> Tensors:
    from tunesmith.ops.attention_varlen.reference import attention_varlen

    leaves = [given[name].clone().requires_grad_() for name in ("query", "key", "value")]
    out = attention_varlen(*(x.transpose(0, 1) for x in leaves), lengths, **settings)
    dquery, dkey, dvalue = torch.autograd.grad(out, leaves, given["dout"])
    return {"out": out.detach(), "dquery": dquery, "dkey": dkey, "dvalue": dvalue}


def _attention_case(
    lengths: tuple[int, ...], heads: int, key_heads: int, size: int, *, pad: int = 0, window: int | None = None
) -> Case:
    settings = {"scale": size**-0.5, "window": window}
    name = f"attention of {heads}/{key_heads} heads of {size}, documents {lengths}" + (
        f", window {window}" * bool(window)
    )
    inputs = partial(
        _attention_inputs, lengths=lengths, heads=heads, key_heads=key_heads, size=size, pad=pad
    )  # fmt: skip
    return Case("attention_varlen", name, inputs, partial(_attention, lengths=lengths, settings=settings),
                partial(_plain_attention, lengths=lengths, settings=settings), rounds=True)  # fmt: skip


def cases_at(
    *, tokens: int, hidden: int, ffn: int, heads: int, key_heads: int, size: int, classes: int
) -> Iterator[Case]:
    """Yield the calls of one layer and head of a model of that shape."""
    yield from _norm_cases(tokens, hidden, residual=True)
    yield from _rope_cases(tokens, heads + key_heads, size, size)
    yield from _gate_cases(tokens, ffn, "silu")
    yield from _row_cases(tokens, 2 * ffn)
    yield _attention_case((tokens // 2, 1, tokens - tokens // 2 - 1), heads, key_heads, size, pad=8)
    for name, loss in {
        "plain": _Loss(64, classes),
        "rounded": _Loss(64, classes, rounded=True, divisor=7.0),
    }.items():
        yield Case("linear_cross_entropy", f"row losses, {name}, {classes} classes", loss.inputs, loss.call, loss.plain,
                   ("logits",))  # fmt: skip


CASES: tuple[Case, ...] = (
    *_norm_cases(1, 64),
    *_norm_cases(252, 123),
    *_norm_cases(7, 576, pad=8, residual=True),
    *_norm_cases(5, 3, pad=1),
    *_norm_cases(6, 2560, pad=3, offset=1.0, residual=True),
    *_norm_cases(0, 64),
    *_norm_aliases(),
    *_rope_cases(1, 1, 8, 8),
    *_rope_cases(42, 6, 64, 64, pad=4),
    *_rope_cases(13, 3, 96, 72, offset=1.0),
    *_rope_cases(9, 40, 128, 128, pad=8),
    *_rope_cases(3, 5, 10, 2, pad=1),
    *_rope_cases(0, 3, 8, 8),
    *(case for activation in ("silu", "gelu_tanh") for case in _gate_cases(1, 56, activation)),
    *(case for activation in ("silu", "gelu_tanh") for case in _gate_cases(42, 123, activation, pad=5)),
    *_gate_cases(7, 2100, "silu", pad=1),
    *_gate_cases(0, 8, "silu"),
    *_row_cases(42, 123, pad=5),
    *_row_cases(3, 2560),
    *_loss_cases(),
    _attention_case((5, 1, 42, 13), 4, 2, 8, pad=8),
    _attention_case((129,), 6, 2, 64),
    _attention_case((42, 131), 4, 4, 16, window=7),
)
"""All cases, small: an interpreter runs some hundred programs a second."""

EQUAL_DOCUMENTS: tuple[Case, ...] = (
    _attention_case((512,) * 4, 32, 8, 128, pad=8),
    _attention_case((1000,), 9, 3, 64),
    _attention_case((129, 129), 6, 2, 64),
)
"""For attention through cuDNN."""
