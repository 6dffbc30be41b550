"""Adapters beside a shared base: every token of a step gets the one it asked for, by two small products a layer.

The adapters of a step lie one below the other, A (R, in) and sB (R, out) with R the sum of their ranks. A token's row
of ``x A^T`` is filled with zeros outside its own adapter's columns, so that one product with sB adds to each token
what its adapter adds, whatever the tokens beside it ask for:

    y = W x + fill(x A^T, mask, 0) sB

Filled and not multiplied: what another adapter makes of the token may be infinite, and zero times infinity is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Adapter", "Routing", "install", "uninstall"]

_HELD = 8
"""Adapters that lie in one stack without being asked for in a step, so that their coming and going copies nothing."""


@dataclass(eq=False, frozen=True, slots=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        pairs: module of the base -> A (r, in) and sB (r, out), s being its scale, in the dtype of the base.
        tokenizer: the one that it was trained with where that is another than the base's, else None.
        ends: tokens that end its answers where the tokenizer is its own.
        notes: what its user should know of how it is served.
    """

    name: str
    folder: Path
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    tokenizer: Any = None
    ends: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())


@dataclass(slots=True)
class Routing:
    """Which adapter each token of the current step gets; the modules of the base look it up here.

    Attributes:
        is_known: whether an adapter can be asked for again.
        parts: module -> A, sB and mask (T, R), true outside a token's own adapter, or None, for the current step.
        last_parts: the same for modules that see only the last token of each sequence (the head).
    """

    is_known: Callable[[Adapter], bool]
    parts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    last_parts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    _held: list[Adapter] = field(default_factory=list)
    _stack: dict[str, tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]] = field(default_factory=dict)

    def begin(self, tokens: Sequence[Adapter | None], last: Sequence[int]) -> None:
        """Give every token of a step its adapter; None is the base alone.

        Args:
            last: the tokens whose logits are wanted.
        """
        wanted = list(dict.fromkeys(adapter for adapter in tokens if adapter is not None))
        if not wanted:
            self.parts = self.last_parts = {}
        elif len(wanted) == 1 and None not in tokens:
            self.parts = self.last_parts = {name: (a, b, None) for name, (a, b) in wanted[0].pairs.items()}
        else:
            self._hold(wanted)
            place = {adapter: index for index, adapter in enumerate(self._held)}
            chosen = torch.tensor([-1 if adapter is None else place[adapter] for adapter in tokens])
            self.parts = self._masked(chosen)
            self.last_parts = self._masked(chosen[torch.tensor(last)])

    def clear(self) -> None:
        """Give the memory of the stack back."""
        self.parts, self.last_parts, self._held, self._stack = {}, {}, [], {}

    def _hold(self, wanted: list[Adapter]) -> None:
        """Stack the adapters that are wanted, and those held before as long as they are few and still known."""
        others = [adapter for adapter in self._held if adapter not in wanted and self.is_known(adapter)]
        if {*wanted, *others} == set(self._held):
            return
        self._held = wanted + others[: max(0, _HELD - len(wanted))]
        names = dict.fromkeys(name for adapter in self._held for name in adapter.pairs)
        self._stack = {}
        for name in names:
            pairs = [adapter.pairs.get(name) for adapter in self._held]
            ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
            own = [pair for pair in pairs if pair is not None]
            self._stack[name] = torch.cat([a for a, _ in own]), torch.cat([b for _, b in own]), ranks

    def _masked(self, chosen: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        masks: dict[Any, torch.Tensor] = {}
        parts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}
        for name, (a, b, ranks) in self._stack.items():
            key = ranks, a.device
            if key not in masks:
                owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
                masks[key] = (owner != chosen[:, None]).to(a.device)
            parts[name] = a, b, masks[key]
        return parts


class _WithAdapters(nn.Module):
    """A linear module of the base that adds what the adapters of the current step add."""

    def __init__(self, base: nn.Module, name: str, routing: Routing, is_head: bool) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.routing = routing
        self.is_head = is_head

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the base: some models look at it."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y for x (..., in)."""
        out = self.base(x)
        part = (self.routing.last_parts if self.is_head else self.routing.parts).get(self.name)
        if part is None:
            return out
        a, b, mask = part
        low = nn.functional.linear(x.reshape(-1, x.shape[-1]).to(a.dtype), a)
        if mask is not None:
            low.masked_fill_(mask, 0)
        return torch.addmm(out.reshape(-1, out.shape[-1]), low.to(out.dtype), b.to(out.dtype)).view_as(out)


def install(model: nn.Module, names: Sequence[str], routing: Routing) -> None:
    """Let the modules ``names`` of ``model`` add adapters; those that do already stay as they are."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name in names:
        base = model.get_submodule(name)
        if not isinstance(base, _WithAdapters):
            model.set_submodule(name, _WithAdapters(base, name, routing, base is head))


def uninstall(model: nn.Module) -> None:
    """Put the modules of the base back where they were."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, _WithAdapters)]
    for name, module in found:
        model.set_submodule(name, module.base)
