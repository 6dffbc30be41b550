"""TorchScript gives the bits that the same functions give in Python."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch

from tunesmith.ops import scripted
from tunesmith.ops.attention_varlen import cpu as attention
from tunesmith.ops.lora_linear import cpu as lora
from tunesmith.ops.rms_norm import cpu as rms_norm
from tunesmith.ops.rope import cpu as rope
from tunesmith.ops.swiglu import cpu as swiglu

MODULES = (attention, lora, rms_norm, rope, swiglu)
Draw = Callable[..., torch.Tensor]
pytestmark = pytest.mark.skipif(not scripted._AVAILABLE, reason="torch has no TorchScript for this Python")


def _attention(draw: Draw, *, window: int | None, softcap: float | None) -> list[torch.Tensor]:
    lengths = (33, 47, 64, 33, 165, 5, 48, 64, 300)
    query, dout = draw(sum(lengths), 6, 16), draw(sum(lengths), 6, 16)
    key, value = draw(sum(lengths), 2, 16), draw(sum(lengths), 2, 16)
    settings = {"scale": 0.3, "window": window, "softcap": softcap}
    out, kept = attention.forward(query, key, value, lengths, **settings)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    attention.backward(dout, query, key, value, out, kept, lengths, **settings,
                       dquery=grads[0], dkey=grads[1], dvalue=grads[2])  # fmt: skip
    return [out, *grads]


def _norm(draw: Draw) -> list[torch.Tensor]:
    x, dh, weight = draw(2100, 300), draw(2100, 300), draw(300)
    h, total, rstd = rms_norm.forward(x, weight, eps=1e-5, offset=1.0, residual=dh)
    back = rms_norm.backward(dh, total, weight, rstd, offset=1.0, dresidual=x)
    return [h, rstd, back, rms_norm.backward(dh, total, weight, rstd, offset=0.0)]


def _rotate(draw: Draw) -> list[torch.Tensor]:
    heads, cos, sin = draw(1200, 12, 64), draw(1200, 48), draw(1200, 48)
    turned = heads.clone()
    rope.rotate_(turned, cos, sin)
    rope.rotate_(heads, cos, sin, inverse=True)
    return [turned, heads]


def _gate(draw: Draw) -> list[torch.Tensor]:
    gate_up, dh, hidden = draw(900, 2 * 700), draw(900, 700), draw(900, 700)
    h = swiglu.forward(gate_up, activation="silu")
    return [h, swiglu.backward(dh, gate_up, activation="silu", hidden_out=hidden), hidden]


def _adapters(draw: Draw) -> list[torch.Tensor]:
    x = draw(130, 40)
    projections = [
        lora.Projection(draw(24, 40), draw(24), draw(4, 40).float(), draw(24, 4).float(), scale=0.3),
        lora.Projection(draw(16, 40)),
        lora.Projection(draw(8, 40), None, draw(3, 40).float(), draw(8, 3).float(), scale=2.0),
    ]
    y, s = lora.forward(x, None, projections)
    return [y, s, lora.low_rank_gradient(y, projections)]


CALLS: dict[str, Callable[[Draw], list[torch.Tensor]]] = {
    "attention": lambda draw: _attention(draw, window=None, softcap=None),
    "attention in a window": lambda draw: _attention(draw, window=70, softcap=None),
    "attention with a softcap": lambda draw: _attention(draw, window=None, softcap=2.0),
    "norm": _norm,
    "rotation": _rotate,
    "gated activation": _gate,
    "adapters": _adapters,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_as_in_python(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return CALLS[name](lambda *shape: torch.randn(shape, generator=generator).to(dtype))

    results = [run() for _ in range(3)]  # TorchScript looks at the first run, and optimizes the second
    replaced = 0
    for module in MODULES:
        for key, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType) and hasattr(value, "__wrapped__"):
                monkeypatch.setattr(module, key, value.__wrapped__)
                replaced += 1
    assert replaced == 9
    plain = run()
    for result in results:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, plain, strict=True))
