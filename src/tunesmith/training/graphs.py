"""Whether a run computes its micro-batches from CUDA graphs (``engine/graphs.py``), and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.engine.graphs import CudaRecorder, GraphRunner, padded_tokens
from tunesmith.engine.head import LossHead
from tunesmith.engine.host import is_on_host
from tunesmith.engine.install import engine_of
from tunesmith.engine.policies import Policy
from tunesmith.engine.read import is_quantized
from tunesmith.ops.attention_varlen import cuda
from tunesmith.training.lanes import more_than_sums

if TYPE_CHECKING:
    from tunesmith.memory import TrainingPlan
    from tunesmith.training.sft import SFTTrainer

__all__ = ["GraphChoice", "graphs_of", "graphs_there"]

# Parts of the peak of a step that recordings have once more, in a pool of memory of their own.
_POOLED = ("scratch", "kept", "head", "layer")
# Their frequencies depend on how long the longest document is.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class GraphChoice:
    """Which parts of micro-batches are computed from CUDA graphs.

    Attributes:
        tokens: most tokens of such a part, padded; 0 for none.
        reason: why.
    """

    tokens: int
    reason: str

    def __str__(self) -> str:
        """Return the choice in words."""
        return f"for parts of at most {self.tokens:,} tokens: {self.reason}" if self.tokens else f"none: {self.reason}"


def graphs_there(model: Any, args: Any, plan: TrainingPlan) -> GraphChoice:
    """Return the choice for a run by ``plan``; weights need not be in memory. ``args`` are the training arguments."""
    reason = _obstacle(model, args, plan)
    if reason is not None:
        return GraphChoice(0, reason)
    if plan.host_bound < padded_tokens(1):
        return GraphChoice(0, "the GPU computes longer than it takes to launch its kernels")
    largest = min(1.0, plan.host_bound / max(1, plan.tokens))
    pool = int(largest * sum(plan.parts.get(name, 0) for name in _POOLED))
    if plan.budget is not None and plan.peak + pool > plan.budget:
        return GraphChoice(0, f"their memory, {pool / 2**20:,.0f} MiB, does not fit beside what is planned")
    return GraphChoice(plan.host_bound, "below that the GPU would wait for its host to launch kernels")


def graphs_of(trainer: SFTTrainer) -> tuple[GraphChoice, GraphRunner | None]:
    """Return the choice for a trainer, and what runs its recordings."""
    head, choice = trainer.head, graphs_there(trainer.model, trainer.args, trainer.plan)
    if choice.tokens and not (type(head) is LossHead and head.skips_logits and head.joins_documents):
        choice = GraphChoice(0, "the loss of this model is not computed from joined documents without logits")
    if not choice.tokens:
        return choice, None
    return choice, GraphRunner(head, trainer.model, CudaRecorder(trainer.args.device), most_tokens=choice.tokens)


def _obstacle(model: Any, args: Any, plan: TrainingPlan) -> str | None:
    """Return what of a step cannot be recorded, or None."""
    engine = engine_of(model)
    if args.device.type != "cuda":
        return "there is no GPU"
    if args.world_size > 1:
        return "several processes sum gradients"
    for name in ("deepspeed", "fsdp", "torch_empty_cache_steps"):
        if getattr(args, name, None):
            return f"{name} has its own way through a step"
    if engine is None or engine.plan.unknown or not engine.plan.known:
        return "decoder layers run as transformers wrote them"
    if Policy.OFFLOAD in plan.policies:
        return "inputs of layers go to host memory and back"
    if engine.model.dtype == torch.float16:
        return "a step in float16 may be computed again, which has not been tried"
    reason = more_than_sums(model, args)
    if reason is not None:
        return reason
    if engine.notes:
        return f"decoder layers run as transformers wrote them: {engine.notes[0]}"
    if any(map(is_quantized, model.modules())):
        return "the base is in 4 or 8 bits, which has not been tried"
    if is_on_host(engine.model.get_input_embeddings()):
        return "the embedding lies in host memory"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the weights lie on several devices"
    if _rope_types(engine.model.config.get_text_config()) & set(_LENGTH_DEPENDENT):
        return "the frequencies of the rotary embedding depend on the longest document"
    return _attention_obstacle(engine, args, plan)


def _rope_types(config: Any) -> set[str]:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Of all layers, or by the kind of layer.
    found = [given, *(inner for inner in given.values() if isinstance(inner, dict))]
    return {str(one.get("rope_type") or one.get("type")) for one in found}


def _attention_obstacle(engine: Any, args: Any, plan: TrainingPlan) -> str | None:
    """Return why torch's flash attention does not compute every layer: plain torch reads lengths on the host."""
    reason = cuda.missing(args.device)
    if reason is not None:
        return reason
    dtype = engine.model.get_input_embeddings().weight.dtype
    for shape in dict.fromkeys(engine.plan.known.values()):
        size = shape.head_dim
        possible, reason = cuda.fits(dtype, shape.heads, size, size, plan.host_bound, 1, shape.softcap)
        if not possible:
            return reason
    return None
