"""Training steps of transformers with PEFT, and of ours under every policy, on one random model in one process.

``hf``: gradient checkpointing, bfloat16 autocast as Trainer's ``bf16=True`` has it, SDPA, full logits; documents of
unlike length are padded, eight a micro-batch. ``hf-nockpt``: the same without checkpointing. ``ours-<policy>``: the
engine's layers and the chunked loss, documents joined on one token axis. ``ours-none-graphs``: the same from CUDA
graphs; ``ours-none-fp8``: on the same base stored in float8; ``-nf4``: in 4 bits, where bitsandbytes is installed.
``hf`` runs first and, once the engine has been taken out again, last: no difference smaller than theirs means anything.

All start from the same adapter and see the same documents, so that their losses can be compared.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.models import Work
from benchmarks.gpu.stage import Stage, quantiles

__all__ = ["curve", "headline", "padded", "short_steps", "step_of_transformers", "timed"]

_POLICIES = ("none", "sel_mlp", "sel_min", "full", "offload")
_LEARNING_RATE = 2e-4
_PADDED_ROWS = 8
_CYCLE = 4

# shape -> (work, steps before the clock, timed steps, arms), the most important first.
_Plan = tuple[tuple[Work, int, int, tuple[str, ...]], ...]
_EVERY = ("hf", "hf-nockpt", *(f"ours-{policy}" for policy in _POLICIES), "hf")
_SOME = ("hf", "ours-none", "ours-sel_min", "ours-full")
_FOUR_BITS = ("hf-nf4", "ours-none-nf4", "ours-sel_min-nf4")
_PLANS: dict[str, _Plan] = {
    "8b": (
        (Work("dense", 8192), 2, 4, (*_SOME[:3], "hf", "ours-none-fp8", *_FOUR_BITS)),
        (Work("dense", 8192), 1, 2, ("hf-nockpt", "ours-sel_mlp", "ours-full", "ours-offload")),
        (Work("packed", 8192), 1, 2, _SOME),
        (Work("dense", 2048, 4), 1, 3, _SOME),
        (Work("dense", 32768), 1, 2, (*_SOME, "ours-sel_mlp", "ours-offload")),
    ),
    "4b": ((Work("dense", 8192), 2, 4, _EVERY), (Work("packed", 8192), 1, 2, _SOME)),
    "135m": (
        (Work("packed", 8192), 4, 10, _EVERY),
        (Work("packed", 2048), 4, 20, _SOME),
        (Work("dense", 8192), 2, 6, _SOME),
    ),
    # Micro-batches that a GPU waits for: the same four again and again, all recorded before the clock begins.
    "graphs": (
        (Work("packed", 2048), 2 * _CYCLE, 20, ("hf", "ours-none", "ours-none-graphs", "ours-none", "hf")),
        (Work("packed", 8192), 2 * _CYCLE, 8, ("ours-none", "ours-none-graphs")),
    ),
    "toy-graphs": ((Work("packed", 96, mean=20, longest=40), 2, 6, ("hf", "ours-none", "ours-none-graphs")),),
    "toy-llama": ((Work("dense", 16, 2), 1, 2, (*_EVERY, "ours-none-fp8", *_FOUR_BITS)),),
    "toy-qwen3": ((Work("dense", 24), 1, 1, _SOME),),
    "toy-small": ((Work("packed", 96, mean=20, longest=40), 0, 2, (*_SOME, "hf")),),
}


def headline(stage: Stage, shape: str, *, plan: str | None = None, cycle: int | None = None) -> None:
    """Record every arm of ``plan``, by default that of ``shape``; one that fails, or has no time left, says so.

    With ``cycle`` the documents of a step come again after so many.
    """
    session = _Session(stage, shape)
    for work, warmup, steps, arms in _PLANS[plan or shape]:
        for index, arm in enumerate(arms):
            facts: dict[str, Any] = {"model": shape, "work": work.name, "arm": arm, "repeats": arm in arms[:index]}
            stored = next((width for width in ("fp8", "nf4") if arm.endswith(f"-{width}")), None)
            if stored == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
                stage.record(**facts, missing="the package bitsandbytes is not installed")
                continue
            if session.stored != stored:
                session = _again(session, stored)
            # The slowest arm came first: another one takes no longer.
            if stage.seconds_left < 2 * session.longest:
                stage.record(**facts, missing="no time was left")
                continue
            stage.record(**facts, **session.arm(arm, work, warmup, steps, cycle=cycle))


def _again(session: _Session, stored: str | None) -> _Session:
    """Return a session with the same numbers, its base ``stored`` otherwise; the model of the old one goes first."""
    session.free()
    made = _Session(session.stage, session.shape, stored=stored)
    made.longest = session.longest
    return made


def short_steps(stage: Stage) -> None:
    """Record what CUDA graphs give to steps that a GPU waits for."""
    if stage.is_dry:
        headline(stage, "toy-small", plan="toy-graphs", cycle=_CYCLE)
    else:
        headline(stage, "135m", plan="graphs", cycle=_CYCLE)


class _NotUsedError(RuntimeError):
    """CUDA graphs were given up."""


def curve(stage: Stage, shape: str, work: Work, steps: int) -> None:
    """Record how far the losses of 50 steps, and the adapters after them, are from those of transformers."""
    session = _Session(stage, shape)
    adapters: list[torch.Tensor] = []
    found: list[dict[str, Any]] = []
    for arm in ("hf", "ours-none"):
        found.append(session.arm(arm, work, 0, steps, cycle=8))
        trained = (p.detach().double().flatten() for p in session.model.parameters() if p.requires_grad)
        adapters.append(torch.cat(list(trained)).cpu())
    failed = next((facts["failed"] for facts in found if "failed" in facts), None)
    if failed is not None:
        stage.record(model=shape, work=work.name, failed=failed)
        return
    theirs, ours = (facts["losses"] for facts in found)
    stage.record(
        model=shape,
        work=work.name,
        steps=steps,
        losses={"hf": theirs, "ours-none": ours},
        largest_difference=max(abs(a - b) / abs(a) for a, b in zip(theirs, ours, strict=True)),
        adapter_cosine=float(torch.nn.functional.cosine_similarity(*adapters, dim=0)),
    )


class _Session:
    """One model with its adapter, on which arms run one after another.

    ``stored``: "fp8" or "nf4" for the base's linear layers; None leaves them as they are.
    """

    def __init__(self, stage: Stage, shape: str, *, stored: str | None = None) -> None:
        self.stage, self.shape, self.stored = stage, shape, stored
        self.dtype = torch.float32 if stage.is_dry else torch.bfloat16
        base = models.build(shape, stage.device, self.dtype)
        if stored == "fp8":
            models.to_float8(base)
        elif stored == "nf4":
            models.to_nf4(base, self.dtype)
        self.model = models.adapted(base)
        self.base = self.model.get_base_model()
        self.vocabulary = self.base.config.vocab_size
        self.longest = 0.0
        self._attention = self.base.config._attn_implementation
        self._engine: Any = None
        self._head: Any = None
        self._graphs: Any = None

    def free(self) -> None:
        """Give the model's memory back: the session is over."""
        self.model = self.base = self._engine = self._head = self._graphs = None
        gc.collect()
        if self.stage.device == "cuda":
            torch.cuda.empty_cache()

    def arm(self, arm: str, work: Work, warmup: int, steps: int, *, cycle: int | None = None) -> dict[str, Any]:
        """Train one arm from the start and return its figures, or ``failed`` with the reason."""
        began = time.time()
        self._graphs = None
        gc.collect()
        if self.stage.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        library, _, variant = arm.partition("-")
        try:
            step = self._hf(variant) if library == "hf" else self._ours(variant)
            models.seed_adapter(self.model)
            batches = (
                models.documents(work, self.vocabulary, i % cycle if cycle else i) for i in range(warmup + steps)
            )
            facts = timed(self.model, step, batches, warmup=warmup, device=self.stage.device)
        except torch.OutOfMemoryError as error:
            return {"failed": f"out of memory: {str(error)[:200]}"}
        except _NotUsedError as error:
            return {"failed": str(error)}
        finally:
            self.model.zero_grad(set_to_none=True)
            self.longest = max(self.longest, time.time() - began)
        needed = models.flops_per_token(self.shape, work)
        return {
            **facts,
            "flops_per_token": needed,
            "model_tflops": needed * facts["tokens_per_s"] / 1e12,
            **self._facts(),
        }

    def _facts(self) -> dict[str, Any]:
        from tunesmith.ops import explain

        facts: dict[str, Any] = {"dtype": str(self.dtype).removeprefix("torch.")}
        if self._engine is None:
            return {**facts, "autocast": self.dtype == torch.bfloat16}
        x = torch.empty(0, dtype=self.dtype, device=self.stage.device)
        ops = ("rms_norm", "rope", "swiglu", "attention_varlen", "linear_cross_entropy")
        return {
            **facts,
            "autocast": False,
            "policies": dict(Counter(map(str, self._engine.policies))),
            "plan": str(self._engine.plan),
            "notes": list(self._engine.notes) + self._head.reasons,
            "ops": [explain(op, x) for op in ops],
            "kept_bytes_expected": self._kept_bytes(),
            **({} if self._graphs is None else {"graphs": self._graphs.counts()}),
            **({"float8": self._in_what()} if self.stored == "fp8" else {}),
        }

    def _in_what(self) -> str:
        """Say whether products ran in float8; elsewhere the weights were written out."""
        from tunesmith.engine.float8 import why_no_products
        from tunesmith.ops import explain

        reason = why_no_products(self.base, dtype=self.dtype)
        if reason is not None:
            return f"stored, and not multiplied: {reason}"
        return f"multiplied; {explain('float8', torch.empty(0, dtype=self.dtype, device=self.stage.device))}"

    def _kept_bytes(self) -> int:
        """Return the bytes a token keeps between forward and backward by the engine's own count."""
        from tunesmith.engine.policies import kept_values

        config, ranks = self.base.config, (3 * models.RANK, models.RANK, 2 * models.RANK, models.RANK)
        shapes = self._engine.plan.known
        values = sum(
            kept_values(self._engine.policies[index], shape, config.hidden_size, config.intermediate_size, ranks)
            for index, shape in shapes.items()
        )
        return values * self.dtype.itemsize

    def _hf(self, variant: str) -> Callable[[list[dict[str, Any]]], float]:
        from tunesmith.core.versions import checkpoint_layers

        if self._engine is not None:
            self._engine.revert()
            self._engine = None
            self.base.set_attn_implementation(self._attention)
        checkpoint_layers(self.base, variant != "nockpt")
        self.model.train()
        return step_of_transformers(self.model, self.stage.device, self.dtype)

    def _ours(self, variant: str) -> Callable[[list[dict[str, Any]]], float]:
        from tunesmith.core.versions import checkpoint_layers
        from tunesmith.data.collate import DocumentCollator
        from tunesmith.engine.attention import use_document_attention
        from tunesmith.engine.head import LossHead
        from tunesmith.engine.install import install
        from tunesmith.engine.policies import Policy

        checkpoint_layers(self.base, False)
        self.model.train()
        if self._engine is None:
            reason = use_document_attention(self.base)
            if reason is not None:
                raise RuntimeError(reason)
            self._engine = install(self.base)
            self._head = LossHead(self.base)
            self._head.probe()
        policy, _, way = variant.partition("-")
        self._engine.set_policy(Policy(policy))
        collate, device, head = DocumentCollator(), self.stage.device, self._head
        if way == "graphs":
            return self._replayed(collate)

        def step(rows: list[dict[str, Any]]) -> float:
            batch = collate(rows)
            batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            loss = head.loss(batch, float(len(batch["targets"])))
            loss.backward()
            return float(loss.detach())

        return step

    def _replayed(self, collate: Callable[..., Any]) -> Callable[[list[dict[str, Any]]], float]:
        from benchmarks.gpu.graphs import recorder_for
        from tunesmith.engine.graphs import GraphRunner

        graphs = GraphRunner(self._head, self.model, recorder_for(self.stage.device), most_tokens=2**20)
        self._graphs = graphs

        def step(rows: list[dict[str, Any]]) -> float:
            batch = collate(rows)
            loss = graphs.step(batch, float(len(batch["targets"])))
            if loss is None:
                raise _NotUsedError(f"CUDA graphs were not used: {graphs.off}")
            return float(loss)

        return step


def step_of_transformers(model: Any, device: str, dtype: torch.dtype) -> Callable[[list[dict[str, Any]]], float]:
    """Return a function that runs forward and backward of one step through the model's own loss."""

    def step(rows: list[dict[str, Any]]) -> float:
        count = sum(int((row["labels"] >= 0).sum()) for row in rows)
        # Documents of one length need no padding, and go through together.
        micro = len(rows) if len({len(row["labels"]) for row in rows}) == 1 else _PADDED_ROWS
        total = 0.0
        for start in range(0, len(rows), micro):
            batch = padded(rows[start : start + micro], device)
            with torch.autocast(device, dtype) if dtype == torch.bfloat16 else nullcontext():
                loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(count, device=device)).loss
            loss.backward()
            total += float(loss.detach())
        return total

    return step


def padded(rows: list[dict[str, Any]], device: str) -> dict[str, torch.Tensor]:
    """Return the documents side by side, the shorter ones filled up; no mask where nothing is filled."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.from_numpy(row["input_ids"])
        labels[index, :length] = torch.from_numpy(row["labels"])
        mask[index, :length] = 1
    batch = {"input_ids": ids, "labels": labels, **({} if bool(mask.all()) else {"attention_mask": mask})}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def timed(
    model: Any,
    step: Callable[[list[dict[str, Any]]], float],
    batches: Iterator[list[dict[str, Any]]],
    *,
    warmup: int,
    device: str,
) -> dict[str, Any]:
    """Train with AdamW over ``batches`` and return tokens per second, quantiles, peak memory and losses."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=_LEARNING_RATE, weight_decay=0.0, fused=True
    )
    losses: list[float] = []
    seconds: list[float] = []
    tokens = 0
    for index, rows in enumerate(batches):
        began = time.perf_counter()
        losses.append(step(rows))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        if index >= warmup:
            seconds.append(time.perf_counter() - began)
            tokens += sum(len(row["input_ids"]) for row in rows)
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
    return {
        "tokens_per_s": tokens / sum(seconds),
        "tokens": tokens,
        "step_s": quantiles(seconds),
        **peak,
        "losses": losses,
    }
