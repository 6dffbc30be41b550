"""What recording asks of torch.cuda, and what a step asks of the device: nothing. Without a GPU.

The meta device has shapes and no values: an answer that a step would wait for does not exist there.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils._pytree as pytree
from tests.engine.support import base_of, fused, layers_of
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.engine import graphs
from tunesmith.engine.graphs import Bucket, CudaRecorder, GraphRunner, PlainRecorder
from tunesmith.engine.head import LossHead
from tunesmith.engine.install import engine_of
from tunesmith.engine.policies import Policy
from tunesmith.ops import dispatch
from tunesmith.ops.attention_varlen import cuda

# ---- what is asked of torch.cuda ----


class Cuda:
    """Stands for what the recorder uses of ``torch.cuda``; ``log`` is what was done, in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.pools = 0
        self.current = self.Stream("main", self)

    class Stream:
        """A stream that notes whom it waits for."""

        def __init__(self, name: Any, cuda: Any = None) -> None:
            self.name, self.cuda = name, cuda

        def wait_stream(self, other: Any) -> None:
            """Note it."""
            self.cuda.log.append(f"{self.name} waits for {other.name}")

    def graph_pool_handle(self) -> tuple[int, int]:
        """Return another one each time."""
        self.pools += 1
        return (0, self.pools)

    @contextmanager
    def within(self, what: str, *given: Any) -> Iterator[None]:
        """Note beginning and end of a block."""
        self.log.append((what, *given))
        try:
            yield
        finally:
            self.log.append(f"end of {what}")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Cuda.Stream("own", fake))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: fake.within("stream", stream.name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", fake.graph_pool_handle)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: fake.log.append("replay")))
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph, *, pool, stream: fake.within("graph", pool, stream.name, gc.isenabled())
    )
    return fake


def test_work_runs_and_is_recorded_on_one_stream_with_one_pool(fake_cuda: Cuda) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    log, work = fake_cuda.log, lambda: fake_cuda.log.append("work")
    recorder.run(work)
    assert log == [
        "own waits for main", ("stream", "own"), "work", "end of stream", "main waits for own",
    ]  # fmt: skip
    log.clear()
    replays = [recorder.record(work) for _ in range(2)]
    recorded = [("stream", "main"), ("graph", (0, 1), "own", False), "work", "end of graph", "end of stream"]
    assert log == recorded * 2 and gc.isenabled()
    log.clear()
    replays[0]()
    assert log == ["replay"]
    # A pool whose graphs are all gone cannot be used again.
    recorder.forget()
    recorder.record(work)
    assert log[2] == ("graph", (0, 2), "own", False)


def test_a_recording_that_fails_leaves_the_collector_awake_and_the_stream_that_was(fake_cuda: Cuda) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaRecorder(torch.device("cuda", 0)).record(fail)
    assert gc.isenabled() and fake_cuda.log[0] == ("stream", "main") and fake_cuda.log[-1] == "end of stream"


# ---- nothing is asked of the device ----


class Silent(TorchDispatchMode):
    """Fails where the host would wait for a device, or copy to it."""

    _ASKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        # It makes its tensor on the host and copies it, which no mode sees.
        refusal = AssertionError("torch.tensor copies to the device")
        self._constructor = mock.patch.object(torch, "tensor", side_effect=refusal)

    def __enter__(self) -> Silent:
        """Begin to watch."""
        self._constructor.start()
        return super().__enter__()

    def __exit__(self, *reasons: Any) -> None:
        """End."""
        super().__exit__(*reasons)
        self._constructor.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        self.seen.add(name)
        assert not name.startswith(self._ASKS), f"{name} waits for the device"
        leaves = pytree.tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # A number on the host becomes an argument of a kernel, unless it is to be copied.
        free = 0 if "copy" in name else 1
        assert all(x.is_meta or x.ndim < free for x in tensors), f"{name} reads a tensor on the host"
        found = func(*args, **(kwargs or {}))
        made = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        assert all(x.is_meta or x.ndim == 0 for x in made), f"{name} makes a tensor on the host"
        return found


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the meta device take the way of a GPU, as far as it is Python: torch's flash attention, 16 bits."""
    module = dispatch._module
    monkeypatch.setattr(
        dispatch, "_module", lambda op, found: module(op, "cuda" if op == "attention_varlen" else found)
    )
    monkeypatch.setattr(cuda, "missing", lambda device: None)
    monkeypatch.setattr("tunesmith.engine.read._special", lambda weight: None)
    # There is no autocast on the meta device, and none in a step.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", lambda *given, **settings: nullcontext())


def on_meta(family: str) -> Any:
    changes = {"attn_logit_softcapping": None} if family == "gemma2" else {}
    model = fused(family, adapter={}, **changes).to(torch.bfloat16)
    stacks = [layer._stacks() for layer in layers_of(model)]  # as the step before a recording makes them
    for layer, own in zip(layers_of(model), stacks, strict=True):
        there = [x.to("meta") for x in own]
        layer.__dict__["_stacks"] = lambda there=there: there
    return model.to("meta")


@pytest.mark.parametrize("policy", [Policy.NONE, Policy.SEL_MIN, Policy.FULL])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"])
def test_the_work_asks_the_device_for_nothing(family: str, policy: Policy, as_on_a_gpu: None) -> None:
    model = on_meta(family)
    engine_of(model).set_policy(policy)  # type: ignore[union-attr]
    run = GraphRunner(LossHead(base_of(model)), model, PlainRecorder(), most_tokens=4096)
    run._sums = graphs._GradientSums([p for p in model.parameters() if p.requires_grad])
    work = graphs._Run(Bucket(256, 4, 64), torch.device("meta"), torch.float32)
    with Silent() as mode:
        run._compute(work)
    assert not engine_of(model).notes  # type: ignore[union-attr]
    assert {"_flash_attention_forward.default", "_flash_attention_backward.default"} <= mode.seen
    assert "_foreach_add_.List" in mode.seen and run._sums._reached and all(run._sums._reached)


def test_lengths_on_the_host_would_be_seen(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test before can fail: without the bounds on the device the attention copies them there."""
    model = on_meta("llama")
    run = GraphRunner(LossHead(base_of(model)), model, PlainRecorder(), most_tokens=4096)
    run._sums = graphs._GradientSums([p for p in model.parameters() if p.requires_grad])
    work = graphs._Run(Bucket(256, 4, 64), torch.device("meta"), torch.float32)
    work.inputs.batch["lengths"] = (100, 156)
    monkeypatch.setattr("tunesmith.engine.head._documents", lambda batch: batch["lengths"])
    with pytest.raises(AssertionError, match=r"torch\.tensor copies"), Silent():
        run._compute(work)
