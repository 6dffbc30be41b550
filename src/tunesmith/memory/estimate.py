"""Peak memory of a training run, part by part, from plain numbers: no tensor is made here.

What is predicted is what ``core.memory.peak_bytes`` measures: on a GPU the bytes that torch has allocated, on a CPU the
resident set of the whole process. A run needs

    base + adapter + gradients + optimizer + scratch + what layers keep + the larger of head and one layer's backward

and on a CPU also the interpreter with its libraries, measured in the process that asks. Everything but ``kept``,
``head`` and ``layer`` stands from the first step to the last. Freed blocks below glibc's threshold stay in the heap, so
that gradients count even while they are None; ``_HEAP`` is what such holes cost beyond that.

``benchmarks/memory.py`` compares prediction and measurement; where the engine keeps or reuses something else, change
``kept`` or ``scratch`` here with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.core.versions import installed
from tunesmith.engine.families import LayerShape
from tunesmith.engine.float8 import why_no_products
from tunesmith.engine.host import compute_device, is_on_host
from tunesmith.engine.policies import Policy, kept_names, kept_values
from tunesmith.engine.read import is_quantized, quantized_bytes
from tunesmith.ops.attention_varlen.cpu import groups_of, sizes_for

__all__ = [
    "LIBRARIES_BYTES",
    "Estimate",
    "MemoryShape",
    "PartShape",
    "Setting",
    "eager_bytes",
    "estimate",
    "kept_bytes",
    "present_when_loaded",
    "shape_of",
    "transformers_peak",
]

MIB = 2**20
LIBRARIES_BYTES = (500 + (84 if installed("torchao") else 0)) * MIB
"""Interpreter, torch, transformers, PEFT, Trainer and datasets on a CPU; measured with Python 3.11 and torch 2.13.

transformers imports torchao with every model where it is installed.
"""
_LOADING = 48 * MIB
"""What loading a model and making its trainer leave beside the weights: code, buffers, the last pages of files."""
_QUANTIZING = 48 * MIB
"""What quantizing weights one by one leaves in the heap beyond that."""
_LATER = 12 * MIB
"""Code and buffers that the first step touches after the model is there (autograd, matrix kernels, the optimizer)."""
_HEAP, _HEAP_SHARE = 36 * MIB, 0.03
"""Holes in glibc's heap, and the share of kept values and (four times) gradients that they grow by: calibrated on
benchmarks/results/memory.jsonl."""
_KERNELS, _KERNELS_UNFUSED = 110 * MIB, 170 * MIB
"""Kernels of products in 16 bits on a CPU (``core.memory.limit_kernel_caches``): 50 MiB from the first step, the rest
from later ones with other numbers of tokens."""
_COMPILER = 340 * MIB
"""What torch.compile leaves in the process, and what the update that it built takes for a moment."""
_CHUNK, _CHUNK_GPU = 24 * MIB, 512 * MIB
"""Logits of one chunk of the head (``ops/linear_cross_entropy/function.py``)."""
_LANE_SCRATCH, _LANE_SHARE, _LANE_HEAPS = 1.3, 0.06, 64 * MIB
"""Buffers of lanes, each of the larger half, over buffers of one part; the share of what is kept by which lanes need
more; and holes in heaps of their own, which grow while parts of ever other lengths come."""
_SMALL_PART, _MORE_HOLES = 2048, 2.5
"""In 16 bits kernels that stay lie between what is freed: tokens of the largest part up to which that makes more holes,
and how many times as large they count. Chosen on one configuration of 1,331 tokens, which took 1,725 MiB alone and
1,810 on a busy machine; with 2,665 and 2,962 tokens there were not more. The limit between them is a guess."""


@dataclass(frozen=True, slots=True)
class MemoryShape:
    """The numbers of a model with its adapter that memory depends on.

    Attributes:
        hidden, ffn, vocabulary: widths.
        layers: the shape of every decoder layer that the engine runs; empty where transformers runs them.
        count: of decoder layers.
        ranks: summed ranks of the groups q k v, o, gate up, down, one tuple a layer.
        itemsize: bytes of a weight and of an activation.
        base_bytes: of all frozen weights and buffers as they are in memory.
        trained: parameters that get a gradient (float32).
        trained_bytes: of these, as they are stored.
        kind: "cpu" or "cuda".
        load_bytes: of weights stored in another dtype, which loading needs beside the base for a moment.
        written_out: entries of the largest group of quantized weights, dense while a product reads them.
        quantized: entries of the quantized weights of the layer that has the most; 0 where steps do not write them out.
        float8: whether products of training steps run in float8.
        rebuilt: bytes of the tensors of experts of one layer that PEFT makes anew with the adapter added.
        gradient_bytes: of all gradients, where weights that train are stored in fewer bits; 0: as ``trained_bytes``.
        compiles: whether torch.compile builds the update of the weights: of those that train in int8.
        codes: bytes of the 4-bit codes that stay on a CPU beside weights that train through them.
        head_trains: whether the weight of the output head gets a gradient.
    """

    hidden: int
    ffn: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    count: int
    ranks: tuple[tuple[int, int, int, int], ...]
    itemsize: int
    base_bytes: int
    trained: int
    trained_bytes: int
    kind: str = "cpu"
    load_bytes: int = 0
    heads: int = 1
    key_heads: int = 1
    head_dim: int = 1
    softcap: bool = False
    written_out: int = 0
    quantized: int = 0
    float8: bool = False
    rebuilt: int = 0
    gradient_bytes: int = 0
    compiles: bool = False
    codes: int = 0
    head_trains: bool = False

    @property
    def wide(self) -> int:
        """Bytes of a value that sums are made in."""
        return max(4, self.itemsize)


@dataclass(frozen=True, slots=True)
class PartShape:
    """What is computed together: tokens of each document, and rows that reach the loss."""

    lengths: tuple[int, ...]
    rows: int

    @property
    def tokens(self) -> int:
        """T, all documents on one axis."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Setting:
    """How a step is computed.

    Attributes:
        policies: one a layer.
        state_bytes: bytes of optimizer state a trained parameter; 8 for AdamW.
        lanes: parts that are computed side by side, which share the tokens.
        dense: layers whose quantized weights stay written out.
    """

    policies: tuple[Policy, ...]
    state_bytes: int = 8
    lanes: int = 1
    dense: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by part at the peak of a step, and the peaks of the other phases of a run.

    Attributes:
        parts: name -> bytes; their sum is the peak of a step.
        phases: name -> peak of loading, of a step, of evaluation and of saving.
    """

    parts: dict[str, int]
    phases: dict[str, int] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Peak of a training step."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """Peak of the run."""
        return max([self.step, *self.phases.values()])

    @property
    def activations(self) -> int:
        """Bytes that depend on how a step is computed."""
        return sum(self.parts[name] for name in ("kept", "scratch", "layer", "head") if name in self.parts)


def shape_of(model: Any, *, kind: str | None = None, itemsize: int | None = None, load_bytes: int = 0) -> MemoryShape:
    """Read the shape of a transformers or PEFT model, on any device, ``meta`` included."""
    from tunesmith.engine.install import engine_of

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, engine = base.config.get_text_config(), engine_of(base)
    weight = base.get_input_embeddings().weight
    trained = [p for p in model.parameters() if p.requires_grad]
    trained_ids = {id(p) for p in trained}
    size = itemsize or weight.itemsize
    quantized = [module for module in model.modules() if is_quantized(module)]
    apart = trained_ids | {id(module.weight) for module in quantized}
    kind = kind or compute_device(model).type
    if kind == "cuda" and is_on_host(base.get_input_embeddings()):
        apart.add(id(weight))
    frozen = sum(p.numel() * _bytes_of(p, itemsize) for p in model.parameters() if id(p) not in apart)
    frozen += sum(map(quantized_bytes, quantized))
    count = config.num_hidden_layers
    fused = engine is not None and not engine.plan.unknown and engine.plan.known
    fused = fused and len(base.get_decoder().layers) == len(engine.plan.known)  # none was added
    layers = tuple(engine.plan.known[index] for index in sorted(engine.plan.known)) if engine and fused else ()
    decoder = list(base.get_decoder().layers) if fused else []
    dense = [_written_out(layer, shape) for layer, shape in zip(decoder, layers, strict=True)]
    float8 = kind == "cuda" and bool(layers) and why_no_products(base, dtype=weight.dtype) is None
    ranks = tuple(_ranks(layer, shape) for layer, shape in zip(decoder, layers, strict=True))
    heads = getattr(config, "num_attention_heads", None) or 1
    return MemoryShape(
        hidden=config.hidden_size,
        ffn=_ffn(decoder[0], layers[0])
        if layers
        else getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=weight.shape[0],
        layers=layers,
        count=count,
        ranks=ranks,
        itemsize=size,
        base_bytes=frozen,
        trained=sum(p.numel() for p in trained),
        trained_bytes=sum(map(_stored_bytes, trained)),
        kind=kind,
        load_bytes=load_bytes,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        softcap=getattr(config, "final_logit_softcapping", None) is not None,
        rebuilt=sum(module.get_param().nbytes for module in model.modules() if hasattr(module, "get_param")) // count,
        written_out=max((size for sizes in dense for size in sizes), default=0),
        quantized=0 if float8 else max(map(sum, dense), default=0),
        float8=float8,
        gradient_bytes=sum(p.numel() * p.itemsize for p in trained),
        compiles=any(hasattr(p, "__tensor_flatten__") for p in trained),
        head_trains=any(p.requires_grad and p.shape == weight.shape for p in base.get_output_embeddings().parameters()),
        codes=sum(getattr(module, "codes_bytes", 0) for module in model.modules()) if kind == "cpu" else 0,
    )


def present_when_loaded(shape: MemoryShape, here: int) -> int:
    """Return what a process that holds ``here`` bytes, libraries and data, will hold with the model there."""
    left = _LOADING + (_QUANTIZING if shape.written_out or shape.codes else 0)
    return shape.base_bytes + shape.trained_bytes + ((here + left) if shape.kind == "cpu" else 0)


def estimate(
    shape: MemoryShape,
    part: PartShape,
    setting: Setting,
    *,
    present: int | None = None,
    peak_so_far: int = 0,
    evaluated: PartShape | None = None,
) -> Estimate:
    """Return the bytes of a run whose largest part is ``part``.

    Args:
        present: bytes that this process holds with base and adapter loaded; None: before anything is loaded.
        peak_so_far: the peak of this process until now, with the model loaded; 0: before that.
        evaluated: the largest part of an evaluation.
    """
    standing = shape.base_bytes + shape.trained_bytes
    on_cpu = shape.kind == "cpu"
    if present is None:
        present = (LIBRARIES_BYTES if on_cpu else 0) + standing
    libraries = max(0, present - standing)
    fixed = {
        "libraries": libraries + (_LATER + _HEAP if on_cpu else 0),
        "base": shape.base_bytes,
        "adapter": shape.trained_bytes,
        "gradients": shape.gradient_bytes or shape.trained_bytes,
        "optimizer": setting.state_bytes * shape.trained,
        "dense": setting.dense * shape.quantized * shape.itemsize,
        "codes": shape.codes,
    }
    lanes = setting.lanes
    head = lanes * _head_bytes(shape, -(-part.rows // lanes))
    kept = kept_bytes(shape, part, setting.policies)
    if on_cpu:
        kernels = (_KERNELS if shape.layers else _KERNELS_UNFUSED) * (shape.itemsize == 2) + _COMPILER * shape.compiles
        is_small = shape.itemsize == 2 and part.tokens <= _SMALL_PART
        heaps = int(_LANE_HEAPS * (lanes > 1) * (_MORE_HOLES if is_small else 1))
        fixed["libraries"] += kernels + heaps + int(_HEAP_SHARE * (kept + 4 * fixed["gradients"]))
    kept += int(_LANE_SHARE * kept) if lanes > 1 else 0
    layer = _layer_bytes(shape, part, lanes) + (lanes * fixed["gradients"] if lanes > 1 else 0)
    parts = {
        **fixed,
        "scratch": int(_scratch_bytes(shape, part, setting.policies) * (_LANE_SCRATCH if lanes > 1 else 1.0))
        + lanes * shape.written_out * shape.itemsize * (setting.dense < shape.count),
        "kept": kept,
        # The head runs when everything is kept; so does the backward of the last layer. What was kept waits in the
        # engine's buffers for the next part, while each lane gathers gradients of its own.
        **({"head": head, "layer": 0} if head >= layer else {"head": 0, "layer": layer}),
    }
    parts = {name: size for name, size in parts.items() if size}
    standing_later = sum(fixed.values())
    # Weights and moments are written from where they are.
    phases = {"save": standing_later}
    # A weight that is quantized stands beside itself in 32 bits; then what was not is copied out of its file.
    quantizing = max(4 * shape.written_out, shape.vocabulary * shape.hidden * shape.itemsize)
    beside = quantizing if on_cpu and shape.written_out else shape.load_bytes
    phases["load"] = peak_so_far or libraries + shape.base_bytes + beside
    if evaluated is not None:
        forward = _scratch_bytes(shape, evaluated, (Policy.FULL,) * shape.count)
        rows = _head_bytes(shape, evaluated.rows, gradient=False)
        phases["evaluation"] = (
            standing_later
            + forward
            + max(rows, _layer_bytes(shape, evaluated))
            + (3 * evaluated.tokens * shape.hidden * shape.itemsize)
        )
    return Estimate(parts, phases)


def transformers_peak(shape: MemoryShape, rows: int, longest: int, *, state_bytes: int = 8) -> tuple[int, int]:
    """Return what transformers' own checkpointing needs for a micro-batch padded to (rows, longest): peak, activations.

    Layer inputs of all layers; the logits of all tokens, their log-softmax and their gradient, in float32; one layer
    that is computed again under autograd comes when the logits are gone, and counts where it is larger. On a CPU the
    real peak is higher: between layer inputs that stay, glibc's heap keeps most of what was freed (4.4 GiB measured
    where this says 2.3, and 2.2 were measured with every block given back at once). Ours has to stay below the lower.
    """
    tokens = rows * longest
    inputs = tokens * shape.hidden * shape.itemsize * shape.count
    upcast = 0 if shape.itemsize >= 4 else 2 * shape.itemsize
    logits = tokens * shape.vocabulary * (3 * shape.wide + upcast)
    layer = 2 * tokens * eager_bytes(shape)
    held = LIBRARIES_BYTES if shape.kind == "cpu" else 0
    fixed = held + shape.base_bytes + shape.trained_bytes + (4 + state_bytes) * shape.trained
    activations = inputs + max(logits, layer)
    return fixed + activations, activations


def eager_bytes(shape: MemoryShape) -> int:
    """Return the bytes a token that one layer of transformers with PEFT keeps under autograd without checkpointing."""
    size, wide, hidden = shape.itemsize, shape.wide, shape.hidden
    attention = shape.heads * shape.head_dim
    qkv = attention + 2 * shape.key_heads * shape.head_dim
    own = 4 * hidden + qkv + 3 * attention + 4 * shape.ffn
    # In 16 bits norms work on float32 copies and PEFT casts the input of every adapter.
    casts = 0 if size >= 4 else 4 * hidden + 5 * hidden + attention + shape.ffn
    return own * size + casts * wide


def _stored_bytes(parameter: Any) -> int:
    """Return the bytes of a Parameter; of one that torchao stores in other tensors, those of these."""
    parts = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else ()
    return sum(getattr(parameter, name).nbytes for name in parts) or parameter.numel() * parameter.itemsize


def _bytes_of(parameter: Any, itemsize: int | None) -> int:
    return itemsize if itemsize is not None and parameter.is_floating_point() else parameter.itemsize


def _ranks(layer: Any, shape: LayerShape) -> tuple[int, int, int, int]:
    found = [0, 0, 0, 0]
    for number, paths in enumerate(shape.groups):
        for path in paths:
            adapters = getattr(layer.get_submodule(path), "lora_A", {})
            found[number] += sum(adapters[name].weight.shape[0] for name in adapters)
    return found[0], found[1], found[2], found[3]


def _ffn(layer: Any, shape: LayerShape) -> int:
    return _base(layer.get_submodule(shape.groups[3][0])).in_features


def _written_out(layer: Any, shape: LayerShape) -> list[int]:
    """Return the entries of each group that holds quantized weights, 0 for the others."""
    groups = [[_base(layer.get_submodule(path)) for path in paths] for paths in shape.groups]
    return [sum(m.in_features * m.out_features for m in group) * any(map(is_quantized, group)) for group in groups]


def _base(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def kept_bytes(shape: MemoryShape, part: PartShape, policies: Sequence[Policy]) -> int:
    """Return what all layers keep between forward and backward, the rotary tables and hidden states at the end."""
    tokens, size = part.tokens, shape.itemsize
    if not shape.layers:
        # transformers' layers keep everything, or their inputs and, while one is computed again, all of that one.
        whole = tokens * eager_bytes(shape) + shape.rebuilt
        is_kept = [policy is Policy.NONE for policy in policies]
        inputs = tokens * shape.hidden * size * (len(is_kept) - sum(is_kept))
        return whole * sum(is_kept) + inputs + (whole if not all(is_kept) else 0)
    total = 0
    for index, (layer, ranks, policy) in enumerate(zip(shape.layers, shape.ranks, policies, strict=True)):
        values = kept_values(policy, layer, shape.hidden, shape.ffn, ranks)
        total += tokens * values * size
        if index == shape.count - 1:
            # Behind the attention of the last layer only rows with a label are computed.
            total -= (tokens - min(part.rows, tokens)) * _behind_attention(policy, layer, shape, ranks) * size
        if shape.kind == "cuda" and policy not in (Policy.FULL, Policy.OFFLOAD):
            total += tokens * layer.heads * 4  # log-sum-exps of the attention
    return total + 2 * tokens * shape.head_dim * 4 + 2 * tokens * shape.hidden * size


def _behind_attention(policy: Policy, layer: LayerShape, shape: MemoryShape, ranks: tuple[int, ...]) -> int:
    width = {"x2": shape.hidden, "y": shape.hidden, "z": shape.hidden, "gate_up": 2 * shape.ffn,
             "s_o": ranks[1], "s_gate_up": ranks[2], "s_down": ranks[3]}  # fmt: skip
    return sum(width.get(name, 0) for name in kept_names(policy, layer))


def _scratch_bytes(shape: MemoryShape, part: PartShape, policies: Sequence[Policy]) -> int:
    """Return the engine's buffers: the union of what the policies ask for by name (``engine/layer.py``)."""
    widths: dict[str, int] = {}
    for layer, policy in dict.fromkeys(zip(shape.layers, policies, strict=False)):
        hidden, ffn, attention = shape.hidden, shape.ffn, layer.heads * layer.head_dim
        qkv = (layer.heads + 2 * layer.key_heads) * layer.head_dim
        kept = set(kept_names(policy, layer))
        own = {"h": hidden, "m": ffn, "dm": ffn, "dh": hidden, "dx2": hidden, "do": attention, "dqkv": qkv,
               "do_all": attention, "dx_all": hidden, "y": hidden}  # fmt: skip
        own |= {name: size for name, size in (("qkv", qkv), ("o", attention), ("x2", hidden)) if name not in kept}
        # What is saved may not be overwritten: its gradient needs a buffer of its own.
        own["dgate_up" if "gate_up" in kept else "gate_up"] = 2 * ffn
        if layer.head_norms is not None:
            own["turned"] = qkv
        if layer.has_post_norms:
            own |= {"dy": hidden, "dz": hidden, "z": hidden}
        for name, size in own.items():
            widths[name] = max(widths.get(name, 0), size)
    # The widest group in float8, a byte a value, and the codes of a weight turned for the backward.
    codes = (part.tokens * max(2 * shape.ffn, *widths.values()) + shape.written_out) if shape.float8 else 0
    return part.tokens * shape.itemsize * sum(widths.values()) + codes


def _layer_bytes(shape: MemoryShape, part: PartShape, lanes: int = 1) -> int:
    """Return what one layer's backward allocates and gives back: attention's grids and scores, gradients of weights."""
    if not shape.layers:
        return part.tokens * eager_bytes(shape) + shape.rebuilt
    size, wide = shape.itemsize, shape.wide
    own = 2 * 4 * shape.trained // max(1, shape.count) + 2 * part.tokens * shape.hidden * size
    if shape.kind == "cuda":
        return own + part.tokens * shape.heads * shape.head_dim * (wide + size)
    query, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    step, positions = sizes_for(size, shape.heads // max(1, shape.key_heads))
    most = 0
    for group in groups_of(tuple(part.lengths), shape.heads, step, positions):
        # Lanes share the documents of a part.
        together, length = -(-len(group.lengths) // lanes), group.length
        block = shape.heads * min(length, positions) * length
        # q, k, v and the gradients of output and q; those of k and v in sums. Two products, weights, their slope.
        grids = together * length * ((3 * query + 3 * keys) * size + 2 * keys * wide)
        scores = together * block * (2 * size + 2 * wide + (2 * (size + wide) if size < 4 else 0))
        most = max(most, grids + scores)
    return own + most * min(lanes, len(part.lengths))


def _head_bytes(shape: MemoryShape, rows: int, *, gradient: bool = True) -> int:
    """Return the final norm under autograd, hidden rows with their gradient, and one chunk of logits."""
    size, wide = shape.itemsize, shape.wide
    most = _CHUNK_GPU if shape.kind == "cuda" else _CHUNK
    logits = min(max(rows, 1), max(16, most // (shape.vocabulary * size))) * shape.vocabulary * size
    if shape.kind == "cpu":
        # Widened in blocks of 16 rows; a softcap keeps its slope too.
        logits += 16 * shape.vocabulary * wide * ((size < wide) + (shape.softcap and gradient))
    if gradient and shape.head_trains:
        # The gradient of its weight is summed wide; beside it stands the product of a chunk, then what is handed on.
        logits += shape.vocabulary * shape.hidden * (wide + size)
    # A norm that transformers wrote makes wide copies of its input; behind fused layers training does without them.
    copies = 2 if not gradient else 0 if shape.layers else 6
    norm = rows * shape.hidden * (2 * size + copies * wide)
    return logits + norm + (rows * shape.hidden * size if gradient else 0)
