"""What ``attention_varlen/cuda.py`` asks of torch's flash attention and of cuDNN, without a GPU.

Its calls are intercepted: a stand-in that reads them by the names of torch's schema computes what they mean in plain
torch. That the kernels do the same is checked on a GPU by ``benchmarks.gpu_check``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.ops.attention_varlen import cpu, cuda, cudnn, reference
from tunesmith.ops.attention_varlen.documents import Documents, host_lengths

FORWARD = torch.ops.aten._flash_attention_forward.default
BACKWARD = torch.ops.aten._flash_attention_backward.default


def named(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names in the schema, defaults included."""
    schema = op._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False))
    assert not given.keys() & kwargs.keys() and set(kwargs) <= {a.name for a in schema if a.kwarg_only}
    given |= kwargs
    return {a.name: given[a.name] if a.name in given or not a.has_default_value() else a.default_value for a in schema}


def settings_of(call: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return lengths, and scale and window, of what the call asks for."""
    bounds = call["cum_seq_q"]
    lengths = tuple((bounds[1:] - bounds[:-1]).tolist())
    assert bounds.dtype == torch.int32 and torch.equal(bounds, call["cum_seq_k"])
    assert bounds[0] == 0 and bounds[-1] == len(call["query"]) and call["max_q"] == call["max_k"] >= max(lengths)
    assert call["is_causal"] and call["dropout_p"] == 0.0 and min(lengths) >= 0
    left, right = call["window_size_left"], call["window_size_right"]
    assert (left is None and right is None) or (left >= 0 and right == 0)
    return lengths, {"scale": call["scale"], "window": None if left is None else left + 1}


class Kernels(TorchDispatchMode):
    """Stands for the kernels; ``calls`` are those that were made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (FORWARD, BACKWARD):
            return func(*args, **(kwargs or {}))
        call = named(func, args, kwargs or {})
        self.calls.append(call)
        inputs = [call[name] for name in ("query", "key", "value")]
        assert all(x.stride(-1) == 1 for x in inputs)
        lengths, settings = settings_of(call)
        if func is FORWARD:
            log_sum_exp = torch.zeros(inputs[0].shape[1], len(inputs[0]))
            out, _ = cpu.forward(*inputs, lengths, **settings)
            return out, log_sum_exp, *(torch.empty(0) for _ in range(3))
        assert call["logsumexp"].shape == (inputs[0].shape[1], len(inputs[0]))
        grads = [torch.empty(x.shape) for x in inputs]
        cpu.backward(call["grad_out"], *inputs, call["out"], (), lengths, **settings, **named_targets(grads))
        return tuple(grads)


def named_targets(targets: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(("dquery", "dkey", "dvalue"), targets, strict=True))


def inputs(tokens: int, *, heads: int = 4, key_heads: int = 2, size: int = 8) -> list[torch.Tensor]:
    """Return q, k and v beside each other in one tensor, as a layer has them."""
    generator = torch.Generator().manual_seed(tokens)
    whole = torch.randn(tokens, heads + 2 * key_heads, size, generator=generator)
    return list(whole.split((heads, key_heads, key_heads), dim=1))


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything that fits pass for something a GPU can do, in float32 too."""
    cuda._note.cache_clear()

    def supports(query: Any, key: Any, value: Any, lengths: Any, *, softcap: Any = None) -> tuple[bool, str]:
        sizes = (query.shape[1], query.shape[2], value.shape[2], query.shape[0], sum(map(bool, host_lengths(lengths))))
        return cuda.fits(torch.bfloat16, *sizes, softcap)

    monkeypatch.setattr(cuda, "supports", supports)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("lengths", [(37,), (1,), (5, 1, 42, 13), (3, 0, 4)], ids=str)
def test_the_call_means_what_plain_torch_computes(lengths: tuple[int, ...], window: int | None) -> None:
    query, key, value = inputs(sum(lengths))
    settings: dict[str, Any] = {"scale": 0.3, "window": window}
    out = torch.full((len(query), 4, 8), float("nan"))
    gradients = torch.full((len(query), 8, 8), float("nan"))
    dout = torch.randn(out.shape)
    targets = named_targets(gradients.split((4, 2, 2), dim=1))
    with Kernels() as mode:
        returned, kept = cuda.forward(query, key, value, lengths, **settings, out=out)
        cuda.backward(dout, query, key, value, out, kept, lengths, **settings, **targets)
    assert returned is out and len(kept) == 1 and len(mode.calls) == 2
    assert all(call["max_q"] == max(lengths) and len(call["cum_seq_q"]) == 1 + sum(map(bool, lengths))
               for call in mode.calls)  # fmt: skip

    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    expected = reference.attention_varlen(*(x.transpose(0, 1) for x in leaves), lengths, **settings)
    torch.testing.assert_close(out, expected.detach())
    for target, grad in zip(targets.values(), torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(target, grad, atol=1e-5, rtol=1e-5)


def test_bounds_that_are_on_the_device_are_taken_as_they_are() -> None:
    query, key, value = inputs(12)
    bounds = torch.tensor([0, 5, 12, 12, 12], dtype=torch.int32)
    documents = Documents(bounds, 256)
    assert len(documents) == 4 and host_lengths(documents) == (5, 7, 0, 0)
    found = [[torch.empty(x.shape) for x in (query, key, value)] for _ in range(2)]
    dout = torch.randn(query.shape)
    with Kernels() as mode:
        out, kept = cuda.forward(query, key, value, documents, scale=0.3)
        cuda.backward(dout, query, key, value, out, kept, documents, scale=0.3, **named_targets(found[0]))
    assert all(call["cum_seq_q"] is bounds and call["max_q"] == 256 for call in mode.calls) and len(mode.calls) == 2
    plain, _ = cpu.forward(query, key, value, documents, scale=0.3)
    cpu.backward(dout, query, key, value, plain, (), documents, scale=0.3, **named_targets(found[1]))
    assert torch.equal(out, plain) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # What the host knows is not read from the device.
    assert host_lengths(Documents(bounds, 256, (12,))) == (12,)


def test_without_out_the_result_is_not_copied() -> None:
    with Kernels():
        out, _ = cuda.forward(*inputs(7), (7,), scale=0.3)
    assert out.shape == (7, 4, 8)


def test_heads_whose_values_lie_apart_are_packed() -> None:
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(7))
    with Kernels():
        out, _ = cuda.forward(query, key, value, (7,), scale=0.3)
    torch.testing.assert_close(out, cpu.forward(query, key, value, (7,), scale=0.3)[0])


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["odd head", "softcap"])
def test_what_the_kernels_cannot_do_is_plain_torch_and_said_once(
    softcap: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    query, key, value = inputs(9, size=8 if softcap else 6)
    settings: dict[str, Any] = {"scale": 0.3, "softcap": softcap}
    dout = torch.randn(query.shape)
    found = [[torch.empty(x.shape) for x in (query, key, value)] for _ in range(2)]
    with Kernels() as mode, caplog.at_level(logging.WARNING):
        for _ in range(2):
            out, kept = cuda.forward(query, key, value, (4, 5), **settings)
        cuda.backward(dout, query, key, value, out, kept, (4, 5), **settings, **named_targets(found[0]))
    assert not mode.calls and kept == ()
    assert [record.message for record in caplog.records] == [
        "attention runs in plain torch, slower: "
        + ("torch's flash attention has no softcap" if softcap else "heads of 6; a multiple of 8 up to 256 is needed")
    ]
    plain, _ = cpu.forward(query, key, value, (4, 5), **settings)
    cpu.backward(dout, query, key, value, plain, (), (4, 5), **settings, **named_targets(found[1]))
    assert torch.equal(out, plain) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_tokens() -> None:
    query, key, value = inputs(0)
    with Kernels() as mode:
        out, kept = cuda.forward(query, key, value, (), scale=0.3)
    assert out.shape == (0, 4, 8) and kept == () and not mode.calls


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((torch.float32, 32, 128, 128, 100, 1, None), "computes in 16 bits"),
        ((torch.bfloat16, 32, 128, 128, 100, 1, 50.0), "no softcap"),
        ((torch.bfloat16, 16, 192, 128, 100, 1, None), "192 for query and key, of 128 for value"),
        ((torch.bfloat16, 32, 264, 264, 100, 1, None), "multiple of 8 up to 256"),
        ((torch.bfloat16, 32, 100, 100, 100, 1, None), "multiple of 8 up to 256"),
        ((torch.bfloat16, 32, 128, 128, 2**19 - 128, 1, None), "overflow 32-bit offsets"),
        ((torch.bfloat16, 32, 128, 128, 2**18, 2**11, None), "overflow 32-bit offsets"),
    ],
)
def test_what_does_not_fit_has_a_reason(sizes: tuple[Any, ...], reason: str) -> None:
    possible, said = cuda.fits(*sizes)
    assert not possible and reason in said


def test_what_fits() -> None:
    assert cuda.fits(torch.bfloat16, 32, 128, 128, 2**19 - 129, 1, None) == (True, "")
    assert cuda.fits(torch.float16, 9, 64, 64, 8192, 40, None) == (True, "")


def test_tensors_on_a_cpu_are_not_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert cuda.supports(*inputs(3), (3,)) == (False, "cpu tensors")


def test_shapes_on_the_meta_device() -> None:
    """Torch's own shape functions take the call as it is."""
    query, key, value = (x.to("meta", torch.bfloat16) for x in inputs(12))
    out, kept = cuda.forward(query, key, value, (5, 7), scale=0.3, window=4)
    assert out.shape == (12, 4, 8) and out.dtype == torch.bfloat16 and kept[0].shape == (4, 12)
    targets = [torch.empty_like(x) for x in (query, key, value)]
    cuda.backward(out, query, key, value, out, kept, (5, 7), scale=0.3, window=4, **named_targets(targets))


# ---- documents of one length, through cuDNN ----

DENSE_FORWARD = torch.ops.aten._scaled_dot_product_cudnn_attention.default
DENSE_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


class DenseKernels(Kernels):
    """Stands for cuDNN too; ``wrong`` names the direction, "forward" or "backward", in which it computes nonsense."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.wrong, self.dense = wrong, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (DENSE_FORWARD, DENSE_BACKWARD):
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.dense += 1
        call = named(func, args, kwargs or {})
        assert call["is_causal"] and call["dropout_p"] == 0.0 and call["attn_bias"] is None
        q, k, v = (call[name].transpose(1, 2).flatten(0, 1) for name in ("query", "key", "value"))
        documents, heads, length, _ = call["query"].shape
        lengths, apart = (length,) * documents, lambda x: x.unflatten(0, (documents, -1)).transpose(1, 2)
        if func is DENSE_FORWARD:
            assert call["compute_log_sumexp"]
            out, _ = cpu.forward(q, k, v, lengths, scale=call["scale"])
            log_sum_exp = torch.zeros(documents, heads, length, 1)
            out = out.neg() if self.wrong == "forward" else out
            return apart(out), log_sum_exp, None, None, length, length, *(torch.empty(0) for _ in range(3))
        assert call["max_q"] == call["max_k"] == length and call["logsumexp"].shape == (documents, heads, length, 1)
        dout, out = (call[name].transpose(1, 2).flatten(0, 1) for name in ("grad_out", "out"))
        grads = [torch.empty(x.shape) for x in (q, k, v)]
        cpu.backward(dout, q, k, v, out, (), lengths, scale=call["scale"], **named_targets(grads))
        return tuple(apart(grad.neg() if self.wrong == "backward" else grad) for grad in grads)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which a shape is worth preparing for after its second call."""
    monkeypatch.setattr(cudnn, "is_able", lambda device: True)
    monkeypatch.setattr(cudnn, "_lost", {})
    monkeypatch.setattr(cudnn, "_agreed", {})
    # Both calls of three documents of 7 tokens with 4 heads of 8.
    monkeypatch.setattr(cudnn, "_PREPARING_SECONDS", 1.5 * cudnn._SAVED * 7 * 4 * 8 * 3 * 7**2 / cudnn._FLASH_FLOPS)


def attended(kernels: Kernels, lengths: tuple[int, ...], **settings: Any) -> list[torch.Tensor]:
    """Return the output and the gradients of q, k and v."""
    query, key, value = inputs(sum(lengths))
    grads = [torch.full(x.shape, float("nan")) for x in (query, key, value)]
    dout = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    with kernels:
        out, kept = cuda.forward(query, key, value, lengths, scale=0.3, **settings)
        cuda.backward(dout, query, key, value, out, kept, lengths, scale=0.3, **settings, **named_targets(grads))
    return [out, *grads]


def test_a_shape_that_comes_back_goes_to_cudnn(dense: None) -> None:
    kernels = DenseKernels()
    expected = attended(Kernels(), (7, 7, 7))
    for step, (flash, fast) in enumerate([(2, 0), (4, 2), (4, 4)]):
        found = attended(kernels, (7, 7, 7))
        # cuDNN's first results are compared with flash attention's, which is called once more each way.
        assert (len(kernels.calls), kernels.dense) == (flash, fast), step
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_where_cudnn_computes_something_else_it_is_not_used(
    dense: None, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernels, expected = DenseKernels(wrong), attended(Kernels(), (7, 7, 7))
    for _ in range(4):
        for ours, theirs in zip(attended(kernels, (7, 7, 7)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert kernels.dense == (1 if wrong == "forward" else 2)
    assert f"cuDNN's attention ({wrong}, 4/2 heads of 8" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("lengths", "settings"), [((7, 6), {}), ((7, 7, 0), {}), ((7, 7), {"window": 6})], ids=str
)  # fmt: skip
def test_other_documents_stay_with_flash_attention(
    dense: None, lengths: tuple[int, ...], settings: dict[str, Any]
) -> None:
    kernels = DenseKernels()
    for _ in range(4):
        attended(kernels, lengths, **settings)
    assert kernels.dense == 0 and len(kernels.calls) == 8


def test_a_window_that_hides_nothing_is_none(dense: None) -> None:
    kernels = DenseKernels()
    for _ in range(3):
        attended(kernels, (7, 7, 7), window=7)
    assert kernels.dense == 2


def test_cudnn_needs_a_gpu() -> None:
    assert not cudnn.is_able(torch.device("cpu"))
