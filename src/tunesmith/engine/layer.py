"""One decoder layer as one autograd function: forward, recomputation and backward, written out.

    h1 = norm(x)     q k v = h1 W_qkv     o = attention(rotate(q), rotate(k), v)     y = o W_o       x2 = x + y
    h2 = norm(x2)    g u = h2 W_gate_up   m = act(g) u                               z = m W_down    out = x2 + z

with the adapters inside the products (``ops/lora_linear/cpu.py``), norms per head before the rotation where the family
has them, and y, z normalized before they are added for families with post-norms. ``policies.py`` says which of these
are kept; :class:`_Pass` computes the others again, by the same code. Saved tensors go through
``save_for_backward``, so that autograd frees them layer by layer and notices in-place changes.

Only ``rows`` of the output are computed where the caller says so (the last layer of a model, when only labelled rows
reach the loss): everything behind the attention then has that many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.engine.families import LayerShape
from tunesmith.engine.policies import Policy, kept_names
from tunesmith.engine.scratch import Loan, Scratch
from tunesmith.ops.attention_varlen.documents import Lengths
from tunesmith.ops.dispatch import primitives
from tunesmith.ops.float8 import Float8Product
from tunesmith.ops.lora_linear import cpu as lora
from tunesmith.ops.lora_linear.cpu import Projection, dense_shape, write_out
from tunesmith.ops.once import differentiable_once
from tunesmith.ops.quantized.weights import Float8Weight
from tunesmith.ops.rows import side_by_side

__all__ = ["FusedLayer", "Group", "LayerCall"]

QKV, O, GATE_UP, DOWN = range(4)  # noqa: E741  (the name of the projection)


@dataclass(frozen=True, slots=True)
class Group:
    """Projections that read one input, their weights stacked in one tensor, and seeds of their dropout.

    ``stacked`` is None where the weights lie apart, or are in few bits and written out for every product. ``float8`` is
    all of them where products run in float8.
    """

    projections: tuple[Projection, ...]
    stacked: torch.Tensor | None
    seeds: tuple[int, ...] = ()
    float8: Float8Weight | None = None


@dataclass(frozen=True, slots=True)
class LayerCall:
    """Everything that one call of a layer needs beside its input.

    Attributes:
        shape, policy: what is computed and what is kept.
        groups: of the projections q k v, o, gate up, down.
        norms: weights before attention, after it, before the MLP, after it.
        head_norms: weights of the query and key norms, or None.
        cos, sin: (T, Er).
        lengths: of the documents on the token axis, or where they lie on the device.
        rows: (N,) int64 rows of the output that are computed, or None for all.
        parameters: the tensors that may get a gradient, in the order in which autograd gets them.
        scratch: buffers of the engine.
        offload: where ``x`` goes under ``Policy.OFFLOAD``.
    """

    shape: LayerShape
    policy: Policy
    groups: tuple[Group, Group, Group, Group]
    norms: tuple[torch.Tensor | None, ...]
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    cos: torch.Tensor
    sin: torch.Tensor
    lengths: Lengths
    rows: torch.Tensor | None
    parameters: tuple[torch.Tensor, ...]
    scratch: Scratch
    offload: Any = None


class FusedLayer(torch.autograd.Function):
    """``apply(x (T, D), call, *call.parameters) -> (T or N, D)``; see the module."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: LayerCall, *parameters: torch.Tensor) -> torch.Tensor:
        """Compute the layer and keep what the policy says."""
        keeps = any(ctx.needs_input_grad)
        names = kept_names(call.policy, call.shape) if keeps else ()
        # The node owns the loan: buffers come back when the graph is gone, however often it is walked before.
        ctx.loan = call.scratch.lend() if names else None
        run = _Pass(call, x, {}, names, ctx.loan)
        out = run.output()
        if keeps:
            ctx.call, ctx.ticket = call, None
            ctx.versions = [parameter._version for parameter in parameters]
            if call.policy is Policy.OFFLOAD:
                ctx.ticket, own = call.offload.put(x), ()
            else:
                own = (x,)
            ctx.names = [name for name in (*names, "lse") if name in run.values]
            ctx.save_for_backward(*own, *(run.values[name] for name in ctx.names))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of x and of the parameters, as far as they are needed."""
        # They are read again here, and autograd watches only what it saved itself.
        if [parameter._version for parameter in ctx.call.parameters] != ctx.versions:
            raise RuntimeError(
                "weights of this layer were changed in place between its forward and its backward, for example by an "
                "optimizer step, so that its gradients would be wrong. Compute the loss again."
            )
        saved = list(ctx.saved_tensors)
        x = saved.pop(0) if ctx.ticket is None else ctx.call.offload.get(ctx.ticket)
        run = _Pass(ctx.call, x, dict(zip(ctx.names, saved, strict=True)))
        dx = run.gradients(side_by_side(grads[0].reshape(-1, x.shape[1])), needs_input=ctx.needs_input_grad[0])
        found = (run.grads.get(id(parameter)) for parameter in ctx.call.parameters)
        return (
            dx,
            None,
            *(grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad[2:], strict=True)),
        )


class _Pass:
    """One forward or one backward of a layer. ``values`` are the intermediates that exist, by name."""

    def __init__(
        self,
        call: LayerCall,
        x: torch.Tensor,
        values: dict[str, torch.Tensor],
        keep: Sequence[str] = (),
        loan: Loan | None = None,
    ) -> None:
        self._loan = loan
        self.call, self.shape, self.x, self.values, self._keep = call, call.shape, x, values, keep
        self._saved = frozenset(values)
        self.grads: dict[int, torch.Tensor] = {}
        self._norm, self._rope = primitives("rms_norm", x), primitives("rope", x)
        self._swiglu, self._attention = primitives("swiglu", x), primitives("attention_varlen", x)
        self._written = -1
        self._size = (self.shape.heads + 2 * self.shape.key_heads) * self.shape.head_dim

    # ---- forward ----

    def output(self) -> torch.Tensor:
        """Return the layer's output in a new tensor."""
        residual = self.middle()
        hidden = self._swiglu.forward(
            self.gate_up(), activation=self.shape.activation, out=self._temporary("m", len(residual), self._ffn)
        )
        z, self.values["s_down"] = self._project(DOWN, hidden, None)
        if self.shape.has_post_norms:
            self.values["z"] = z
            z = self._normed(z, 3, "dy")
            return z + residual
        return z.add_(residual)

    def attention_inputs(self) -> torch.Tensor:
        """Return (T, H + 2K, E): q, k and v before norms per head; rotated where there are none."""
        if "qkv" not in self.values:
            h = self._normed(self.x, 0, "h")
            qkv, s = self._project(QKV, h, self._buffer("qkv", len(h), self._size))
            if self.call.head_norms is None:
                self._rope.rotate_(self._turning(qkv), self.call.cos, self.call.sin)
            self.values.update(qkv=qkv, s_qkv=s)
        return self._heads(self.values["qkv"])

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q (T, H, E), k (T, K, E) and v (T, K, E) as attention takes them."""
        q, k, v = self._split(self.attention_inputs())
        if self.call.head_norms is None:
            return q, k, v
        turned = self._heads(self._temporary("turned", len(self.x), self._size))
        for source, name, weight, out in zip((q, k), "qk", self.call.head_norms, self._split(turned), strict=False):
            self.values[f"rstd_{name}"] = self._rope.norm_rotate(
                source, weight, self.call.cos, self.call.sin, eps=self.shape.eps, offset=self.shape.offset, out=out
            )
        q, k, _ = self._split(turned)
        return q, k, v

    def attended(self) -> torch.Tensor:
        """Return o (T, H * E)."""
        if "o" not in self.values:
            q, k, v = self.rotated()
            out = self._buffer("o", len(q), self.shape.heads * self.shape.head_dim)
            _, kept = self._attention.forward(
                q, k, v, self.call.lengths, **self._attention_settings, out=out.view(q.shape)
            )
            self.values["o"] = out
            if kept:
                (self.values["lse"],) = kept
        return self.values["o"]

    def middle(self) -> torch.Tensor:
        """Return x2 (N, D), the residual after attention."""
        if "x2" not in self.values:
            o = self._chosen(self.attended())
            keeps_y = self.shape.has_post_norms
            y, s = self._project(O, o, self._buffer("y", len(o), self.x.shape[1]) if keeps_y else self._like_x("y", o))
            self.values.update(s_o=s, y=y)
            if self.shape.has_post_norms:
                y = self._normed(y, 1, "dy")
            x2 = self._buffer("x2", len(o), self.x.shape[1])
            self.values["x2"] = torch.add(self._chosen(self.x), y, out=x2)
        return self.values["x2"]

    def gate_up(self) -> torch.Tensor:
        """Return gate and up (N, 2F)."""
        if "gate_up" not in self.values:
            h = self._normed(self.middle(), 2, "h")
            out, s = self._project(GATE_UP, h, self._buffer("gate_up", len(h), 2 * self._ffn))
            self.values.update(gate_up=out, s_gate_up=s)
        return self.values["gate_up"]

    # ---- backward ----

    def gradients(self, dout: torch.Tensor, *, needs_input: bool) -> torch.Tensor | None:
        """Collect the gradients of the parameters, and return that of x where it is needed."""
        below = needs_input or self._trains_attention() or self._trains(O) or self._wants(self.call.norms[1])
        dx2 = self._through_mlp(dout, needs_input=below)
        return self._through_attention(dx2, needs_input=needs_input) if below and dx2 is not None else None

    def _through_mlp(self, dout: torch.Tensor, *, needs_input: bool) -> torch.Tensor | None:
        gate_up = self.gate_up()
        count, ffn = len(gate_up), self._ffn
        if self.shape.has_post_norms and "z" not in self.values:
            hidden = self._swiglu.forward(
                gate_up, activation=self.shape.activation, out=self._temporary("m", count, ffn)
            )
            self.values["z"], self.values["s_down"] = self._project(DOWN, hidden, self._like_x("z", hidden))
        dz = self._through_norm(dout, "z", 3, "dz") if self.shape.has_post_norms else dout
        d_hidden, hidden = self._temporary("dm", count, ffn), self._temporary("m", count, ffn)
        ds = self._low_rank_gradient(DOWN, dz)
        self._input_gradient(DOWN, dz, ds, d_hidden)
        # What is in scratch may be overwritten; what autograd has saved may be asked for again.
        d_gate_up = self._temporary("dgate_up", count, 2 * ffn) if "gate_up" in self._saved else gate_up
        self._swiglu.backward(d_hidden, gate_up, activation=self.shape.activation, out=d_gate_up, hidden_out=hidden)
        if "s_down" not in self.values:
            self.values["s_down"] = self._low_rank(DOWN, hidden)
        self._collect(DOWN, dz, ds, hidden, self.values["s_down"])
        needs_input = needs_input or self._wants(self.call.norms[2])
        if not needs_input and not self._trains(GATE_UP):
            return None
        x2 = self.middle()
        h = self._normed(x2, 2, "h")
        ds = self._low_rank_gradient(GATE_UP, d_gate_up)
        self._collect(GATE_UP, d_gate_up, ds, h, self.values["s_gate_up"])
        if not needs_input:
            return None
        dh = self._input_gradient(GATE_UP, d_gate_up, ds, self._temporary("dh", *x2.shape))
        return self._norm_backward(dh, x2, 2, dresidual=dout, out=self._temporary("dx2", *x2.shape))

    def _through_attention(self, dx2: torch.Tensor, *, needs_input: bool) -> torch.Tensor | None:
        call, tokens = self.call, len(self.x)
        self.middle()  # makes y and its low-rank input where they are not kept
        dy = self._through_norm(dx2, "y", 1, "dy") if self.shape.has_post_norms else dx2
        o = self.attended()
        chosen = self._chosen(o)
        ds = self._low_rank_gradient(O, dy)
        self._collect(O, dy, ds, chosen, self.values["s_o"])
        if not (needs_input or self._trains_attention()):
            return None
        do = self._input_gradient(O, dy, ds, self._temporary("do", *chosen.shape))
        do = self._spread("do_all", do, tokens)
        q, k, v = self.rotated()
        d_qkv = self._temporary("dqkv", tokens, self._size)
        dq, dk, dv = self._split(self._heads(d_qkv))
        kept = (self.values["lse"],) if "lse" in self.values else ()
        self._attention.backward(
            do.view(q.shape), q, k, v, o.view(q.shape), kept, call.lengths, **self._attention_settings,
            dquery=dq, dkey=dk, dvalue=dv,
        )  # fmt: skip
        self._unrotate(dq, dk, d_qkv)
        h = self._normed(self.x, 0, "h")
        ds = self._low_rank_gradient(QKV, d_qkv)
        self._collect(QKV, d_qkv, ds, h, self.values["s_qkv"])
        if not (needs_input or self._wants(call.norms[0])):
            return None
        dh = self._input_gradient(QKV, d_qkv, ds, self._temporary("dh", *self.x.shape))
        residual = self._spread("dx_all", dx2, tokens)
        return self._norm_backward(dh, self.x, 0, dresidual=residual, out=torch.empty_like(self.x))

    def _unrotate(self, dq: torch.Tensor, dk: torch.Tensor, d_qkv: torch.Tensor) -> None:
        """Turn the gradients of the rotated heads into those of q and k, in place."""
        call = self.call
        if call.head_norms is None:
            self._rope.rotate_(self._turning(d_qkv), call.cos, call.sin, inverse=True)
            return
        q, k, _ = self._split(self.attention_inputs())
        for grad, heads, name, weight in zip((dq, dk), (q, k), "qk", call.head_norms, strict=True):
            rstd = self.values[f"rstd_{name}"]
            total = torch.zeros(weight.shape, dtype=rstd.dtype, device=rstd.device) if weight.requires_grad else None
            self._rope.norm_rotate_backward(
                grad, heads, weight, rstd, call.cos, call.sin, offset=self.shape.offset, out=grad, dweight=total
            )
            if total is not None:
                self.grads[id(weight)] = total.to(weight.dtype)

    # ---- pieces ----

    @property
    def _ffn(self) -> int:
        return sum(p.weight.shape[0] for p in self.call.groups[GATE_UP].projections) // 2

    @property
    def _attention_settings(self) -> dict[str, Any]:
        return {"scale": self.shape.scale, "window": self.shape.window, "softcap": self.shape.softcap}

    def _temporary(self, name: str, *shape: int) -> torch.Tensor:
        return self.call.scratch(name, self.x, *shape)

    def _like_x(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self._temporary(name, len(rows), self.x.shape[1])

    def _buffer(self, name: str, *shape: int) -> torch.Tensor:
        """Return a buffer that is lent for what is kept, else a temporary one."""
        if self._loan is not None and name in self._keep:
            return self._loan(self.x, *shape)
        return self._temporary(name, *shape)

    def _heads(self, qkv: torch.Tensor) -> torch.Tensor:
        return qkv.view(len(qkv), self._size // self.shape.head_dim, self.shape.head_dim)

    def _turning(self, qkv: torch.Tensor) -> torch.Tensor:
        return self._heads(qkv)[:, : self.shape.heads + self.shape.key_heads]

    def _split(self, heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return heads.split((self.shape.heads, self.shape.key_heads, self.shape.key_heads), dim=1)

    def _chosen(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.call.rows is None else x[self.call.rows]

    def _spread(self, name: str, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return ``x`` (N, ...) at its rows of a (T, ...) tensor of zeros."""
        if self.call.rows is None:
            return x
        whole = self._temporary(name, tokens, x.shape[1]).zero_()
        whole[self.call.rows] = x
        return whole

    def _weights(self, group: int) -> torch.Tensor | Float8Product | None:
        """Return the stacked weights of ``group``; those in few bits are written out into one buffer for all groups."""
        g = self.call.groups[group]
        if g.float8 is not None:
            return Float8Product(g.float8, self.call.scratch)
        if g.stacked is not None or not any(p.quantized for p in g.projections):
            return g.stacked
        whole = self._temporary("weights", *dense_shape(g.projections))
        if self._written != group:
            write_out(g.projections, whole)
            self._written = group
        return whole

    def _project(self, group: int, x: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.call.groups[group]
        return lora.forward(x, self._weights(group), g.projections, seeds=g.seeds, out=out)

    def _low_rank(self, group: int, x: torch.Tensor) -> torch.Tensor:
        g = self.call.groups[group]
        return lora.low_rank(x, g.projections, seeds=g.seeds)

    def _input_gradient(self, group: int, dy: torch.Tensor, ds: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        g = self.call.groups[group]
        return lora.input_gradient(dy, ds, self._weights(group), g.projections, seeds=g.seeds, out=out)

    def _low_rank_gradient(self, group: int, dy: torch.Tensor) -> torch.Tensor:
        return lora.low_rank_gradient(dy, self.call.groups[group].projections)

    def _collect(self, group: int, dy: torch.Tensor, ds: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> None:
        """Note the gradients of the parameters of ``group``."""
        g = self.call.groups[group]
        gradients = lora.parameter_gradients(dy, ds, x, s, g.projections, seeds=g.seeds)
        for p, found in zip(g.projections, gradients, strict=True):
            for name, grad in found.items():
                self.grads[id(getattr(p, name))] = grad

    def _normed(self, x: torch.Tensor, which: int, name: str) -> torch.Tensor:
        weight = self.call.norms[which]
        assert weight is not None
        out = self._temporary(name, *x.shape)
        h, _, rstd = self._norm.forward(x, weight, eps=self.shape.eps, offset=self.shape.offset, out=out)
        self.values[f"rstd_{which}"] = rstd
        return h

    def _through_norm(self, dout: torch.Tensor, value: str, which: int, name: str) -> torch.Tensor:
        """Return the gradient before the post-norm ``which`` of ``value``."""
        before = self.values[value]
        self._normed(before, which, name)
        return self._norm_backward(dout, before, which, dresidual=None, out=self._temporary(name, *before.shape))

    def _norm_backward(
        self, dh: torch.Tensor, x: torch.Tensor, which: int, *, dresidual: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor:
        weight, rstd = self.call.norms[which], self.values[f"rstd_{which}"]
        assert weight is not None
        if weight.requires_grad:
            self.grads[id(weight)] = self._norm.weight_gradient(dh, x, rstd).to(weight.dtype)
        return self._norm.backward(dh, x, weight, rstd, offset=self.shape.offset, dresidual=dresidual, out=out)

    @staticmethod
    def _wants(weight: torch.Tensor | None) -> bool:
        return weight is not None and weight.requires_grad

    def _trains(self, group: int) -> bool:
        return any(
            x is not None and x.requires_grad
            for p in self.call.groups[group].projections
            for x in (p.weight, p.bias, p.a, p.b)
        )

    def _trains_attention(self) -> bool:
        """Whether something in front of the o projection is trained."""
        norms = (self.call.norms[0], *(self.call.head_norms or ()))
        return self._trains(QKV) or any(map(self._wants, norms))
