"""Training and generating with this library changes nothing of the libraries under it."""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

import torch
from tests import provenance
from tests.training import support

WATCHED = (
    "torch",
    "torch.nn.functional",
    "torch.utils.checkpoint",
    "transformers.trainer",
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.integrations.sdpa_attention",
    "peft.peft_model",
    "peft.mapping",
    "peft.tuners.lora.layer",
    "peft.tuners.lora.model",
    "accelerate.accelerator",
)


def test_a_run_replaces_no_attribute(tmp_path: Path) -> None:
    modules = {name: importlib.import_module(name) for name in WATCHED}
    before = provenance.attributes(modules)
    environment, dtype, threads = dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()
    flags = torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled(), torch.get_float32_matmul_precision()

    trainer = support.trainer(tmp_path, rows=8, model=support.adapted(use_gradient_checkpointing=True), eval_split=0.0)
    trainer.train()
    trainer.model.eval()
    trainer.model.generate(input_ids=torch.arange(5)[None], max_new_tokens=3, pad_token_id=0)

    after = provenance.attributes(modules)
    assert {name for name in before if after.get(name) != before[name]} == set()
    assert len(before) > 1000
    # accelerate notes for its own use which launcher started it.
    changed = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    assert {name for name in changed if not name.startswith("ACCELERATE_")} == set()
    assert torch.get_default_dtype() == dtype
    assert torch.get_num_threads() == threads
    assert (
        torch.backends.cuda.matmul.allow_tf32,
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
    ) == flags


def test_nothing_in_the_libraries_is_code_of_ours() -> None:
    assert provenance.replaced_by("tunesmith", sys.modules) == []


def test_the_check_sees_a_replacement() -> None:
    """Or it would prove nothing."""

    class Layer:
        def forward(self) -> None: ...

    def ours() -> None: ...

    ours.__module__ = "tunesmith.engine.attention"
    module = types.ModuleType("torch.fake")
    Layer.__module__ = "torch.fake"
    module.Layer, module.function = Layer, ours  # type: ignore[attr-defined]
    assert provenance.replaced_by("tunesmith", {"torch.fake": module}) == ["torch.fake.function"]
    before = provenance.attributes({"torch.fake": module})
    Layer.forward = ours  # type: ignore[method-assign]
    assert provenance.replaced_by("tunesmith", {"torch.fake": module}) == [
        "torch.fake.Layer.forward",
        "torch.fake.function",
    ]
    assert provenance.attributes({"torch.fake": module}) != before
