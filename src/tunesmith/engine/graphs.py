"""Forward and backward of a micro-batch recorded once and run again: for steps that a GPU waits in for its host.

A small model, or a short micro-batch, is a thousand kernels that each run shorter than Python takes to launch them. A
CUDA graph is launched at once, but reads and writes the same places in every run, so:

* a micro-batch is padded to a :class:`Bucket`: tokens with one more document, the bounds of documents with documents
  without tokens, labelled rows with idle ones. None of them enters a sum: what they get is a gradient of exactly zero;
* its tensors, the divisor of the loss and the sums of the gradients lie in buffers of their own. The sums are the
  ``.grad`` of the parameters: micro-batches add up there, whether they ran from a recording or not;
* what is allocated on the way comes from one pool of memory that all recordings share, since they run one at a time.

A bucket is run as it is when it is first seen, which compiles and allocates whatever a first run does, and recorded
when it is seen again. A :class:`Recorder` does both: that for CUDA, or :class:`PlainRecorder`, which runs the work
again and is the truth that a recording is compared with.

On an H200 and an H100 recordings gave the losses of launched steps (``make gpu-check``, stage ``graphs``).
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from tunesmith.engine.install import engine_of
from tunesmith.engine.scratch import Scratch
from tunesmith.ops.attention_varlen.documents import Documents
from tunesmith.ops.rows import wide_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.engine.head import LossHead

__all__ = ["Bucket", "CudaRecorder", "GraphRunner", "PlainRecorder", "Recorder", "bucket_of", "padded_tokens"]

_log = logging.getLogger(__name__)

_FINE, _COARSE, _FINE_UP_TO = 256, 1024, 4096
_MOST_GRAPHS = 64
"""Recordings at most: each keeps some megabytes on host and device, and costs as long as a few steps."""
_MOST_RESETS = 3
_IDLE = -100
_Batch = dict[str, Any]
_Work = Callable[[], None]


class Bucket(NamedTuple):
    """The sizes of a recording: tokens, documents, labelled rows."""

    tokens: int
    documents: int
    rows: int


def padded_tokens(tokens: int) -> int:
    """Return ``tokens`` rounded up to a multiple of 256, above 4,096 of 1,024."""
    step = _FINE if tokens <= _FINE_UP_TO else _COARSE
    return -(-tokens // step) * step


def bucket_of(tokens: int, documents: int, rows: int) -> Bucket:
    """Return the smallest bucket with room for a micro-batch and one more document.

    Documents are a power of two, rows a quarter of the tokens, two quarters, three or all.
    """
    padded = padded_tokens(tokens)
    quarter = padded // 4
    return Bucket(padded, 1 << documents.bit_length(), max(1, -(-rows // quarter)) * quarter)


class Recorder(Protocol):
    """Runs work, and records it to be run again."""

    def run(self, work: _Work) -> None:
        """Run ``work`` once as it is."""
        ...

    def record(self, work: _Work) -> _Work:
        """Return what runs ``work`` again; ``work`` has been run once before, and does not count as run by this."""
        ...

    def forget(self) -> None:
        """Give back what recordings share, all of which are gone."""
        ...


class PlainRecorder:
    """Records nothing: runs the work again. Any device; what a recording has to equal."""

    def run(self, work: _Work) -> None:
        """Run ``work``."""
        work()

    def record(self, work: _Work) -> _Work:
        """Return ``work``."""
        return work

    def forget(self) -> None:
        """There is nothing to give back."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory, recorded on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._pool = device, torch.cuda.Stream(device), None

    def run(self, work: _Work) -> None:
        """Run ``work`` on the stream of the recordings, so that libraries set themselves up there."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: _Work) -> _Work:
        """Record ``work``, which must not ask the device for anything.

        Raises:
            RuntimeError: from torch, where it does, or memory is too small.
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        # A recording that fails leaves its stream as the current one: torch.cuda.stream puts the other one back.
        with torch.cuda.device(self._device), torch.cuda.stream(current), _collector_asleep():
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                work()
        return graph.replay

    def forget(self) -> None:
        """Begin a new pool: the old one goes with its last graph."""
        self._pool = None


@contextmanager
def _collector_asleep() -> Iterator[None]:
    """Let no object end in a recording only because the garbage collector comes by: what it frees may ask CUDA."""
    was_awake = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_awake:
            gc.enable()


class GraphRunner:
    """Computes micro-batches of one model by recordings, and says which it does not.

    Args:
        head: the loss of the model, on fused layers all through.
        model: whose parameters train; what ``head.model`` is inside, with its adapter.
        recorder: what runs and records.
        most_tokens: micro-batches that are longer when padded are left to the caller.
        most_graphs: recordings at most; further buckets run as they are.

    Attributes:
        recorded, replayed, launched: recordings made, and micro-batches run from one, and as they are.
        off: why nothing is recorded any more, or None.
    """

    def __init__(
        self,
        head: LossHead,
        model: Any,
        recorder: Recorder,
        *,
        most_tokens: int,
        most_graphs: int = _MOST_GRAPHS,
    ) -> None:
        self._head, self._model, self._recorder = head, model, recorder
        self._most_tokens, self._most_graphs = most_tokens, most_graphs
        self._runs: dict[Bucket, _Run] = {}
        self._sums = _GradientSums([])
        self._known: Any = None
        self._resets = 0
        self.recorded = self.replayed = self.launched = 0
        self.off: str | None = None

    def step(self, batch: _Batch, divisor: float | torch.Tensor) -> torch.Tensor | None:
        """Add the gradients of ``batch`` to ``.grad``, and return its summed loss over ``divisor``.

        ``batch`` is what :class:`tunesmith.data.collate.DocumentCollator` makes, on the host or the device. Returns
        None, and has changed nothing, where the caller has to compute it.
        """
        bucket = bucket_of(batch["input_ids"].shape[1], len(batch["cu_seqlens"]) - 1, len(batch["rows"]))
        if self.off is not None or bucket.tokens > self._most_tokens or not self._is_current():
            return None
        run = self._runs.get(bucket)
        is_new = run is None
        if run is None:
            run = self._runs[bucket] = _Run(bucket, self._sums.device, self._loss_dtype)
        run.inputs.fill(batch, divisor)
        self._sums.load()
        if not is_new and run.replay is None and self.recorded < self._most_graphs and not self._record(run):
            return None
        if run.replay is not None:
            run.replay()
            self.replayed += 1
        else:
            self._recorder.run(partial(self._compute, run))
            self.launched += 1
            if not self.recorded:
                self._known = self._state()  # a first run may put weights that were moved side by side
        self._sums.attach()
        # A copy: the next run writes the same place.
        return run.loss.clone()

    def counts(self) -> dict[str, int]:
        """Return recordings, and micro-batches run from one and as they are, by name."""
        return {"recorded": self.recorded, "replayed": self.replayed, "launched": self.launched}

    def close(self) -> None:
        """Give all recordings and their memory back; gradients stay."""
        self._runs.clear()
        self._recorder.forget()
        self.recorded, self._known = 0, None

    def _record(self, run: _Run) -> bool:
        notes = self._engine.notes
        if notes:
            self._switch_off(f"decoder layers run as transformers wrote them: {notes[0]}")
            return False
        handled = sys.exception()  # someone may train while he handles an error
        try:
            run.replay = self._recorder.record(partial(self._compute, run))
        except RuntimeError as error:
            reason = _why_not_recorded(error, handled)
            if reason is None:
                raise
            self._switch_off(reason)
            return False
        self.recorded += 1
        return True

    def _compute(self, run: _Run) -> None:
        """Read the inputs of ``run``, add to the sums, write the loss: all that is recorded."""
        engine = self._engine
        # Buffers of the engine grow and are freed again: a recording must not write where they were.
        shared, engine.scratch = engine.scratch, Scratch()
        try:
            loss = self._head.loss(run.inputs.batch, run.inputs.divisor)
            # Not .backward(): what adds to .grad there belongs to a stream of its own.
            grads = torch.autograd.grad(loss, self._sums.parameters, allow_unused=True)
        finally:
            engine.scratch = shared
        self._sums.add(grads)
        run.loss.copy_(loss.detach())

    def _is_current(self) -> bool:
        """Drop all recordings where weights lie elsewhere or something else trains; say whether there is a use."""
        state = self._state()
        if state == self._known:
            return True
        self._resets += self._known is not None
        self.close()
        if self._resets > _MOST_RESETS:
            self._switch_off("weights are moved, or other ones trained, again and again")
            return False
        self._sums = _GradientSums([p for p in self._model.parameters() if p.requires_grad])
        self._known = self._state()
        return True

    def _state(self) -> tuple[Any, ...]:
        """Return what a recording depends on and may change between steps."""
        if self._known is None:
            self._weights = list(self._model.parameters())
            self._adapters = [module for module in self._model.modules() if hasattr(module, "lora_A")]
        weights = [(weight.data_ptr(), weight.requires_grad) for weight in self._weights]
        adapters = [
            (module.merged, module.disable_adapters, *module.active_adapters, *module.scaling.items())
            for module in self._adapters
        ]
        return weights, adapters, tuple(self._engine.policies), self._head.model.training

    def _switch_off(self, reason: str) -> None:
        self.close()
        self.off = reason
        _log.warning("CUDA graphs are off, steps are launched kernel by kernel: %s", reason)

    @property
    def _engine(self) -> Any:
        return engine_of(self._head.model)

    @property
    def _loss_dtype(self) -> torch.dtype:
        return wide_dtype(self._head.model.get_input_embeddings().weight.dtype)


class _Run:
    """A bucket: its inputs, its loss, and what runs it again once it is recorded."""

    def __init__(self, bucket: Bucket, device: torch.device, loss_dtype: torch.dtype) -> None:
        self.inputs = _Inputs(bucket, device)
        self.loss = torch.zeros((), dtype=loss_dtype, device=device)
        self.replay: _Work | None = None


class _Inputs:
    """A micro-batch of a bucket's sizes, in buffers that stay where they are.

    What pads: one document of token 0 that nothing is trained on, documents without tokens behind it, and idle rows
    (``has_idle`` of ``ops.linear_cross_entropy``) at the last token, which never carries a label.
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._bucket = bucket
        self._counted = torch.arange(bucket.tokens, device=device)
        self._bounds = integers(bucket.documents + 1, dtype=torch.int32)
        # In float64 every number of tokens is exact; it is rounded to what it divides.
        self.divisor = torch.ones((), dtype=torch.float64, device=device)
        self.batch: _Batch = {
            "input_ids": integers(1, bucket.tokens),
            "position_ids": integers(1, bucket.tokens),
            "cu_seqlens": self._bounds,
            "lengths": Documents(self._bounds, bucket.tokens),
            "max_length": bucket.tokens,
            "rows": integers(bucket.rows),
            "targets": integers(bucket.rows),
            "has_idle": True,
        }

    def fill(self, batch: _Batch, divisor: float | torch.Tensor) -> None:
        """Write all of every buffer."""
        tokens = batch["input_ids"].shape[1]
        last, behind = self._bucket.tokens - 1, self._bucket.tokens - tokens
        _put(self.batch["input_ids"][0], batch["input_ids"][0], 0)
        _put(self.batch["position_ids"][0], batch["position_ids"][0], self._counted[:behind])
        _put(self._bounds, batch["cu_seqlens"], self._bucket.tokens)
        _put(self.batch["rows"], batch["rows"], last)
        _put(self.batch["targets"], batch["targets"], _IDLE)
        if isinstance(divisor, torch.Tensor):
            self.divisor.copy_(divisor)
        else:
            self.divisor.fill_(divisor)


def _put(buffer: torch.Tensor, values: torch.Tensor, rest: int | torch.Tensor) -> None:
    buffer[: len(values)].copy_(values, non_blocking=True)
    behind = buffer[len(values) :]
    if isinstance(rest, torch.Tensor):
        behind.copy_(rest)
    else:
        behind.fill_(rest)


class _GradientSums:
    """The ``.grad`` of parameters in tensors that stay where they are."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self._sums = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]
        # What the loss does not reach keeps .grad None: an optimizer passes it by.
        self._reached: list[bool] | None = None

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.parameters[0].device

    @torch.no_grad()
    def load(self) -> None:
        """Make the sums what ``.grad`` is now: None is 0, and another tensor is copied."""
        cleared: list[torch.Tensor] = []
        for parameter, total in zip(self.parameters, self._sums, strict=True):
            if parameter.grad is None:
                cleared.append(total)
            elif parameter.grad is not total:
                total.copy_(parameter.grad)
        if cleared:
            torch._foreach_zero_(cleared)

    @torch.no_grad()
    def add(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Add ``grads``, one a parameter, to the sums.

        Raises:
            ValueError: they reach other parameters than before.
        """
        reached = [grad is not None for grad in grads]
        if self._reached is not None and reached != self._reached:
            raise ValueError("the loss reaches other parameters than in the steps before")
        self._reached = reached
        totals = [total for total, grad in zip(self._sums, grads, strict=True) if grad is not None]
        torch._foreach_add_(totals, [grad for grad in grads if grad is not None])

    def attach(self) -> None:
        """Make the sums the ``.grad`` of the parameters that are reached."""
        for parameter, total, is_reached in zip(self.parameters, self._sums, self._reached or (), strict=True):
            if is_reached and parameter.grad is not total:
                parameter.grad = total


def _why_not_recorded(error: BaseException, handled: BaseException | None) -> str | None:
    """Return why a recording failed, or None where the error is not one of recording.

    A failed recording ends in an error of its own, behind the one that it failed by; ``handled`` was there before.
    """
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    is_of_recording = isinstance(error, RuntimeError) and "captur" in str(error).lower()
    if not is_of_recording and not isinstance(error, torch.OutOfMemoryError):
        return None
    return str(error).strip().split("\n")[0]
