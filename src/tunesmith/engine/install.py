"""Put fused decoder layers into one model instance, and take them out again.

``plan(model)`` says for every decoder layer whether the engine knows it; ``install(model)`` swaps the known ones for
objects of a class of ours that *is* the original class (``isinstance`` and the class name hold, so that FSDP wrapping
and recorded hidden states go on working), shares its children and parameters, and computes what the original would
where it cannot do better: with a key-value cache, under autocast, with adapters that are more than plain LoRA. No
class, module or function of another library is changed; ``Engine.revert()`` puts the original layers back.

Weights that read one input (q k v; gate up) are stacked: each Parameter becomes a view of one tensor, so that one
matrix product serves them all. Keys, values and memory stay what they were. Whatever moves a Parameter elsewhere
(``.to()``, loading, merging) is noticed in the next call, and the stack made again.

The swap happens at load. A layer's forward is chosen per call; ``Engine.notes`` says what ran the slower way, and why.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from tunesmith.core.memory import forget_pages, trim_heap
from tunesmith.engine.attention import ATTENTION, document_lengths
from tunesmith.engine.dense import DenseWeights
from tunesmith.engine.families import LayerShape, blocks_of, describe
from tunesmith.engine.layer import FusedLayer, Group, LayerCall
from tunesmith.engine.norm import fuse_norm, revert_norm
from tunesmith.engine.offload import HostStore
from tunesmith.engine.policies import Policy
from tunesmith.engine.read import read_blocks, read_norm, read_projection, unreadable
from tunesmith.engine.scratch import Scratch
from tunesmith.engine.stacks import is_distributed, lie_elsewhere, lies_in, stack
from tunesmith.ops.attention_varlen.documents import Documents, Lengths
from tunesmith.ops.float8 import why_not
from tunesmith.ops.lora_linear.cpu import Projection
from tunesmith.ops.quantized.weights import Float8Weight

__all__ = ["Engine", "PatchPlan", "engine_of", "install", "plan"]

_log = logging.getLogger(__name__)
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True)
class PatchPlan:
    """Which decoder layers of a model are fused.

    Attributes:
        known: index of a layer -> its shape.
        unknown: index of a layer -> why it stays as transformers wrote it.
    """

    known: dict[int, LayerShape]
    unknown: dict[int, str]

    @property
    def reasons(self) -> list[str]:
        """One line for each reason why layers are not fused."""
        found = list(self.unknown.values())
        return [
            f"{found.count(reason)} decoder layers run as transformers wrote them, slower: {reason}"
            for reason in dict.fromkeys(found)
        ]

    def __str__(self) -> str:
        """Return a line for the fused layers and one for each reason against the others."""
        total = len(self.known) + len(self.unknown)
        return "\n".join([f"{len(self.known)} of {total} decoder layers fused", *self.reasons])


@dataclass(eq=False)
class Engine:
    """The fused layers of one model, and what they share.

    Attributes:
        model: the transformers model (inside PEFT: the base model).
        plan: what was swapped.
        policies: what each layer keeps, in order of the layers.
        is_chosen: whether ``set_policy`` chose them; until then transformers' own checkpointing flag decides.
        notes: reasons for which a fused layer ran its original forward, each once.
        scratch: buffers used by all layers in turn.
        store: where inputs of layers go under ``Policy.OFFLOAD``.
        dense: quantized weights that stay written out.
    """

    model: Any
    plan: PatchPlan
    policies: list[Policy]
    is_chosen: bool = False
    notes: list[str] = field(default_factory=list)
    scratch: Scratch = field(default_factory=Scratch)
    store: HostStore = field(default_factory=HostStore)
    dense: DenseWeights = field(default_factory=DenseWeights)
    _originals: dict[int, Any] = field(default_factory=dict)
    # Of each thread: parts of a micro-batch may be computed side by side.
    _batches: dict[int, _Batch] = field(default_factory=dict)
    _last_lengths: dict[int, tuple[Any, Any, tuple[int, ...]]] = field(default_factory=dict)

    def set_policy(self, policy: Policy | Sequence[Policy]) -> None:
        """Choose what the layers keep: one policy for all, or one a layer.

        Raises:
            ValueError: as many policies as layers are needed.
        """
        count = len(self.policies)
        chosen = [policy] * count if isinstance(policy, Policy) else list(policy)
        if len(chosen) != count:
            raise ValueError(f"{len(chosen)} policies for {count} layers")
        self.policies, self.is_chosen = chosen, True

    @contextmanager
    def batch(self, lengths: Sequence[int] | Documents, rows: torch.Tensor | None = None) -> Iterator[_Batch]:
        """Tell the layers, for one forward of this thread, the documents and the rows that are needed at its end.

        When the last layer cut its output down to ``rows``, ``cut`` of what is yielded is True.
        """
        thread = threading.get_ident()
        self._batches[thread] = _Batch(lengths if isinstance(lengths, Documents) else tuple(lengths), rows)
        try:
            yield self._batches[thread]
        finally:
            del self._batches[thread]

    def revert(self) -> None:
        """Put the original layers back, every Parameter in a tensor of its own again."""
        layers = self.model.get_decoder().layers
        for index, original in self._originals.items():
            fused = layers[index]
            for parameter in fused.parameters():
                if parameter.untyped_storage().nbytes() != parameter.numel() * parameter.itemsize:
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            # Flags that were set on the fused layer meanwhile; children, parameters and hooks are shared.
            original.__dict__.update({key: value for key, value in fused.__dict__.items() if key not in _OWN})
            layers[index] = original
        revert_norm(getattr(self.model.get_decoder(), "norm", None))
        self._originals.clear()
        self.scratch.clear()
        self.dense.clear()
        self.store.close()
        if getattr(self.model, "tunesmith_engine", None) is self:
            del self.model.tunesmith_engine

    def note(self, reason: str) -> None:
        """Say once that layers run the slower way."""
        if reason not in self.notes:
            self.notes.append(reason)
            _log.warning("decoder layers run as transformers wrote them, slower: %s", reason)

    def lengths(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Lengths:
        """Return the documents on the flattened token axis of ``hidden`` (B, T, D)."""
        thread = threading.get_ident()
        told = self._batches.get(thread)
        if told is not None:
            return told.lengths
        mask = kwargs.get("attention_mask")
        source = next(
            (x for x in (mask, kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")) if x is not None), None
        )
        # The same for all layers of a forward. A caller may fill one tensor anew for a batch: that raises its version.
        version = None if source is None or source.is_inference() else source._version
        key, known = (hidden.shape[:2], version, bool(kwargs.get("use_cache"))), self._last_lengths.get(thread)
        if version is None or known is None or known[0] is not source or known[1] != key:
            found = document_lengths(hidden.shape[0], hidden.shape[1], mask, kwargs)
            self._last_lengths[thread] = known = (source, key, tuple(x for row in found for x in row))
        return known[2]

    def rows_of(self, layer: Any) -> torch.Tensor | None:
        """Return the rows that ``layer`` has to compute, or None for all."""
        told = self._batches.get(threading.get_ident())
        # The last one now: layers may have been added.
        if told is None or told.rows is None or self.model.get_decoder().layers[-1] is not layer:
            return None
        told.cut = True
        return told.rows


@dataclass
class _Batch:
    lengths: Lengths
    rows: torch.Tensor | None
    cut: bool = False


def engine_of(model: Any) -> Engine | None:
    """Return the engine of a transformers or PEFT model, or None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "tunesmith_engine", None)


def plan(model: Any) -> PatchPlan:
    """Say which decoder layers of a causal language model the engine knows, without changing anything."""
    known: dict[int, LayerShape] = {}
    unknown: dict[int, str] = {}
    layers = getattr(model.get_decoder(), "layers", None) if hasattr(model, "get_decoder") else None
    if model.config._attn_implementation != ATTENTION:
        reason = f"the attention is {model.config._attn_implementation!r}, not the engine's own"
        return PatchPlan({}, dict.fromkeys(range(len(layers or ())), reason))
    for index, layer in enumerate(layers or ()):
        found = describe(layer)
        if isinstance(found, LayerShape):
            paths = [path for group in found.groups for path in group]
            found = next(filter(None, (unreadable(layer.get_submodule(path)) for path in paths)), found)
        if isinstance(found, LayerShape):
            known[index] = found
        else:
            unknown[index] = found
    return PatchPlan(known, unknown)


def install(model: Any, policy: Policy = Policy.NONE) -> Engine:
    """Swap the decoder layers that the engine knows, and return the engine; a second call returns the first one's.

    A layer of each kind is tried on a few tokens before: one that differs from transformers' own stays as it is.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    present = engine_of(base)
    if present is not None:
        return present
    found = plan(base)
    layers = base.get_decoder().layers if found.known else []
    engine = Engine(base, found, [policy] * (len(found.known) + len(found.unknown)))
    agree: dict[Any, bool] = {}
    for index, shape in list(found.known.items()):
        places = [(weight, weight.data_ptr()) for weight in layers[index].parameters()]
        fused = _fuse(layers[index], shape, engine, index)
        kind = (shape, tuple(type(module) for module in layers[index].modules()))
        if kind not in agree:
            agree[kind] = _agrees(layers[index], fused)
        if not agree[kind]:
            del found.known[index]
            found.unknown[index] = f"{type(layers[index]).__name__} computes something else than the engine's layer"
            continue
        engine._originals[index] = layers[index]
        layers[index] = fused
        fused._stacks()
        # Loaded weights are views of their file, which stays mapped as long as one of them lies there: without this,
        # those that were stacked would count twice.
        forget_pages((place, weight.nbytes) for weight, place in places if weight.data_ptr() != place)
    trim_heap()  # of those that were converted, and lay there before they were stacked
    if found.known and not found.unknown and hasattr(base.get_decoder(), "norm"):
        shape = found.known[0]
        fuse_norm(base.get_decoder().norm, like=layers[0].get_submodule(shape.norms[0] or ""), offset=shape.offset)
    base.tunesmith_engine = engine
    return engine


_OWN = ("_engine", "_shape", "_index", "_stacked", "_is_apart", "_blocks")


def _fuse(layer: Any, shape: LayerShape, engine: Engine, index: int) -> Any:
    """Return the fused twin of ``layer``: same children, parameters, hooks and flags."""
    fused = object.__new__(_class_for(type(layer)))
    fused.__dict__.update(layer.__dict__)
    fused.__dict__.update(
        _engine=engine, _shape=shape, _index=index, _stacked=[None] * len(shape.groups), _is_apart=False,
        _blocks=blocks_of(layer, shape),
    )  # fmt: skip
    return fused


def _remade(original: type) -> Any:
    """Return a fused layer of the class ``original`` without anything in it, for pickle and copy."""
    return object.__new__(_class_for(original))


_CLASSES: dict[type, type] = {}


def _class_for(original: type) -> type:
    if original not in _CLASSES:
        made = type(original.__name__, (_FusedMixin, original), {})
        if "forward" in made.__dict__:
            # transformers wraps every subclass's forward for checkpointing; what ours keeps is its policy's affair.
            del made.forward  # type: ignore[attr-defined]
        _CLASSES[original] = made
    return _CLASSES[original]


class _FusedMixin:
    """Forward of a fused layer, in front of the class of the layer that it replaces."""

    _engine: Engine
    _shape: LayerShape
    _index: int
    _stacked: list[torch.Tensor | None]
    _is_apart: bool
    _blocks: tuple[Any, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let layers be pickled: their class is made here and stands in no module, the one behind it does."""
        _, _, original, *_ = type(self).__mro__
        return _remade, (original,), self.__dict__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the hooks of a module; older transformers wrap checkpointing around ``__call__``."""
        return nn.Module.__call__(self, *args, **kwargs)  # type: ignore[arg-type]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what the original layer returns for (B, T, D)."""
        checkpoints = self.gradient_checkpointing and self.training  # type: ignore[attr-defined]
        if checkpoints and torch.is_grad_enabled() and kwargs.get("past_key_values") is not None:
            # As transformers has it: the layer is computed twice, and would grow the cache twice.
            kwargs |= {"past_key_values": None, "use_cache": False}
        elif kwargs.get("past_key_values") is not None:
            kwargs.setdefault("use_cache", True)  # Gemma's models do not say so; see ``document_lengths``
        call = self._call(hidden_states, args, kwargs)
        if isinstance(call, LayerCall):
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            # Autocast to the dtype that everything has already would only slow it down.
            with torch.autocast(hidden_states.device.type, enabled=False):
                out = FusedLayer.apply(flat, call, *call.parameters)
            return out.view(hidden_states.shape) if call.rows is None else out[None]
        if call:
            self._engine.note(call)
        original = super().forward  # type: ignore[misc]
        if checkpoints:
            return self._gradient_checkpointing_func(partial(original, **kwargs), hidden_states, *args)  # type: ignore[attr-defined]
        return original(hidden_states, *args, **kwargs)

    def _call(self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | str:
        """Return all that the fused forward needs, or why it cannot be used; the reason is empty where none is due."""
        position = kwargs.get("position_embeddings")
        mask = kwargs.get("attention_mask")
        if args or position is None or kwargs.get("past_key_values") is not None or kwargs.get("output_attentions"):
            return ""  # generation, and callers who want more than the output
        if torch.compiler.is_compiling():
            return ""  # what is written out by hand cannot be traced
        try:
            is_changed = blocks_of(self, self._shape) != self._blocks
        except (AttributeError, KeyError):
            is_changed = True
        if is_changed:
            return "a block inside the layer was changed after it was loaded"
        if mask is not None and mask.ndim != 1:
            return "the attention mask is more than documents side by side"
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != hidden.dtype:
            return f"autocast computes in {torch.get_autocast_dtype(kind)}, the hidden states are {hidden.dtype}"
        attention = self.self_attn  # type: ignore[attr-defined]
        if attention.config._attn_implementation != ATTENTION:
            return f"the attention is {attention.config._attn_implementation!r}"
        training = bool(self.training)  # type: ignore[attr-defined]
        if training and attention.attention_dropout:
            return f"attention_dropout is {attention.attention_dropout}"
        read = self._read(hidden, training)
        if isinstance(read, str):
            return read
        groups, norms, head_norms, parameters = read
        engine, shape = self._engine, self._shape
        cos, sin = (x.expand(hidden.shape[0], -1, -1).flatten(0, 1) for x in position)
        return LayerCall(
            shape=shape,
            policy=self._policy(),
            groups=groups,
            norms=norms,
            head_norms=head_norms,
            cos=cos,
            sin=sin,
            lengths=engine.lengths(hidden, kwargs),
            rows=engine.rows_of(self),
            parameters=parameters,
            scratch=engine.scratch,
            offload=engine.store,
        )

    def _policy(self) -> Policy:
        if not torch.is_grad_enabled():
            return Policy.FULL  # without a graph there is no backward to keep anything for
        # Someone else's gradient_checkpointing_enable() counts where nobody has chosen a policy.
        asked = self.gradient_checkpointing and self.training  # type: ignore[attr-defined]
        return Policy.FULL if asked and not self._engine.is_chosen else self._engine.policies[self._index]

    def _read(self, hidden: torch.Tensor, training: bool) -> Any:
        """Return groups, norms, head norms and parameters, or the reason why one of them is not plain."""
        shape, submodule = self._shape, self.get_submodule  # type: ignore[attr-defined]
        reason = read_blocks(self)
        if reason:
            return reason
        groups: list[Group] = []
        parameters: list[torch.Tensor] = []
        for stacked, paths in zip(self._stacks(), shape.groups, strict=True):
            projections: list[Projection] = []
            for path in paths:
                found = read_projection(submodule(path), training=training)
                if isinstance(found, str):
                    return found
                weight = None if found.quantized else found.weight
                if weight is not None and weight.dtype != hidden.dtype:
                    return f"hidden states are {hidden.dtype}, a weight is {weight.dtype}"
                projections.append(found)
                parameters += [x for x in (weight, found.bias, found.a, found.b) if x is not None]
            float8, stacked = _float8(projections, stacked, hidden), None if _is_codes(stacked) else stacked
            drops = any(p.dropout for p in projections)
            # From torch's own generator, so that a resumed run draws the same.
            seeds = torch.randint(2**62, (len(projections),)).tolist() if drops else ()
            groups.append(Group(tuple(projections), stacked, tuple(seeds), float8 if training else None))
        norms: list[torch.Tensor | None] = []
        for path in (*shape.norms, *(shape.head_norms or ())):
            weight = None if path is None else read_norm(submodule(path))
            if isinstance(weight, str):
                return weight
            norms.append(weight)
            parameters += [] if weight is None else [weight]
        trained = [id(parameter) for parameter in parameters if parameter.requires_grad]
        if len(set(trained)) < len(trained):
            return "a weight that trains stands twice inside the layer"
        head_norms = (norms[4], norms[5]) if shape.head_norms else None
        filled = self._engine.dense.filled(self._index, groups, hidden)
        return filled, tuple(norms[:4]), head_norms, tuple(parameters)

    def _stacks(self) -> list[torch.Tensor | None]:
        """Return the stacked weights of each group, made again where a Parameter has moved."""
        for number, paths in enumerate(self._shape.groups):
            weights = [_weight(self.get_submodule(path)) for path in paths]  # type: ignore[attr-defined]
            present = self._stacked[number]
            if len(weights) > 1:
                # FSDP, and optimizers over one flat buffer, put Parameters over memory of their own, which they fill
                # anew for every step: one that was moved out of there would keep old weights. So what has moved into a
                # larger tensor stays where it is, and with several processes whatever has moved.
                moved = present is not None and not lies_in(present, weights)
                self._is_apart |= moved and (is_distributed() or lie_elsewhere(present, weights))
            self._stacked[number] = None if self._is_apart and len(weights) > 1 else stack(present, weights)
        return self._stacked


def _weight(module: Any) -> Any:
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return getattr(base, "weight", None)


def _is_codes(stacked: torch.Tensor | None) -> bool:
    return stacked is not None and not stacked.is_floating_point()


def _float8(projections: Sequence[Projection], stacked: torch.Tensor | None, x: torch.Tensor) -> Float8Weight | None:
    """Return the weights of a group in one where its products with ``x`` run in float8.

    In training steps alone: there a rounded activation is one noise among others. Whatever is evaluated is computed
    with the numbers that the weights stand for, as they will be exported.
    """
    found = [p.quantized for p in projections]
    if stacked is None or not torch.is_grad_enabled() or not all(isinstance(w, Float8Weight) for w in found):
        return None
    weights = [w for w in found if isinstance(w, Float8Weight)]
    if any(why_not(w.shape, is_blocked=w.is_blocked, dtype=x.dtype, device=x.device) for w in weights):
        return None
    scales = weights[0].scales if len(weights) == 1 else torch.cat([w.scales for w in weights])
    return Float8Weight(stacked.view(torch.float8_e4m3fn), scales)


@torch.no_grad()
def _agrees(original: Any, fused: Any) -> bool:
    """Compare both layers on two short documents."""
    shape: LayerShape = fused._shape
    # The norm's: those of quantized layers are integers.
    weight = fused.get_submodule(shape.norms[0] or "").weight
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, weight.shape[0], generator=generator)
    x = x.to(weight.device, weight.dtype)
    size = int(shape.head_dim * (getattr(original.self_attn.config, "partial_rotary_factor", None) or 1.0))
    angle = torch.rand(1, 12, size // 2, generator=generator).repeat(1, 1, 2).to(weight.device)
    embeddings = (angle.cos().to(weight.dtype), angle.sin().to(weight.dtype))
    bounds = torch.tensor([0, 7, 12], dtype=torch.int32, device=weight.device)
    given = {"position_embeddings": embeddings, "attention_mask": None, "cu_seq_lens_q": bounds}
    call = fused._call(x, (), given)
    if isinstance(call, str):
        return not call or fused._engine.note(call) is None
    ours, theirs = (layer(x, **given).float() for layer in (fused, original))
    scale = float(theirs.abs().max()) or 1.0
    return bool((ours - theirs).abs().max() <= _TOLERANCE[weight.dtype] * scale)
