"""The norm behind the last layer: gradients as transformers gives them, fewer copies, and otherwise nothing changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests import tiny
from tests.engine.support import FAMILIES, adapted, fused

from tunesmith.engine.install import engine_of
from tunesmith.engine.norm import fuse_norm


def norm_of(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder().norm


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_transformers(family: str) -> None:
    ours, theirs = norm_of(fused(family)).double(), norm_of(tiny.tiny_model(family)).double()
    assert type(ours) is not type(theirs) and isinstance(ours, type(theirs))
    found = []
    for norm in (ours, theirs):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator, dtype=torch.float64))
        x = torch.randn(2, 5, norm.weight.shape[0], generator=generator, dtype=torch.float64).requires_grad_()
        y = norm(x)
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum().backward()
        found.append((y, x.grad, norm.weight.grad))
    # transformers computes in float32 whatever it is given.
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_what_is_kept_and_held_is_a_few_copies() -> None:
    def largest(norm: Any) -> int:
        """Return the bytes between forward and backward, and of what the backward makes, in inputs."""
        x = torch.randn(8192, norm.weight.shape[0], dtype=torch.bfloat16).requires_grad_()
        with torch.profiler.profile(profile_memory=True) as profile:
            norm(x).sum().backward()
        held = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most // x.nbytes

    theirs, ours = norm_of(tiny.tiny_model("llama", hidden_size=512)), norm_of(fused("llama", hidden_size=512))
    assert largest(ours.bfloat16()) <= 4 < 10 <= largest(theirs.bfloat16())


def test_an_evaluation_computes_as_before() -> None:
    ours, theirs = norm_of(fused("llama")).bfloat16(), norm_of(tiny.tiny_model("llama")).bfloat16()
    x = torch.randn(3, 40, ours.weight.shape[0], generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_other_norms_stay_as_they_are() -> None:
    model = tiny.tiny_model("llama")
    for norm in (torch.nn.LayerNorm(8), torch.nn.RMSNorm(8)):
        kind = type(norm)
        assert not fuse_norm(norm, like=model.model.layers[0].input_layernorm, offset=0.0)
        assert type(norm) is kind
    # A weight that is stored less one gives something else.
    gemma = tiny.tiny_model("gemma")
    kind = type(norm_of(gemma))
    assert not fuse_norm(norm_of(gemma), like=gemma.model.layers[0].input_layernorm, offset=0.0)
    assert type(norm_of(gemma)) is kind and "tunesmith_offset" not in vars(norm_of(gemma))


def test_copies_pickles_and_trained_copies_of_peft() -> None:
    model = fused("llama")
    norm = norm_of(model)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(twin) is type(norm) and twin is not norm and torch.equal(twin.weight, norm.weight)
    trained = adapted(model, modules_to_save=["norm"])
    inside = norm_of(trained).modules_to_save["default"]
    assert type(inside) is type(norm) and inside.weight.requires_grad
    engine = engine_of(trained)
    assert engine is not None
    engine.revert()
    assert norm_of(trained).weight.shape == norm.weight.shape
