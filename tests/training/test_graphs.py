"""When a run uses CUDA graphs and what it says, and a trainer's steps through recordings, run again on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.engine.support import PHI3, adapted, assert_same, fused
from tests.training import support

from tunesmith.engine.graphs import GraphRunner, PlainRecorder
from tunesmith.engine.install import engine_of
from tunesmith.engine.policies import Policy
from tunesmith.memory import TrainingPlan
from tunesmith.ops.attention_varlen import cuda
from tunesmith.training import graphs
from tunesmith.training.graphs import graphs_there
from tunesmith.training.sft import SFTTrainer


def plan(**changes: Any) -> TrainingPlan:
    own: dict[str, Any] = {
        "mode": "auto", "policies": (Policy.NONE,) * 2, "part_tokens": None, "phases": {}, "peak": 900, "budget": 1000,
        "reason": "a test", "tokens": 4000, "host_bound": 4000,
        "parts": {"base": 800, "scratch": 10, "kept": 30, "head": 20},
    }  # fmt: skip
    return TrainingPlan(**{**own, **changes})


def arguments(**changes: Any) -> Any:
    own = {"device": torch.device("cuda"), "world_size": 1, "neftune_noise_alpha": None, "optim": "adamw_torch"}
    return SimpleNamespace(**{**own, **changes})


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that has torch's flash attention, as far as is asked."""
    monkeypatch.setattr(cuda, "missing", lambda device: None)


def model(family: str = "llama", *, adapter: dict[str, Any] | None = None, **changes: Any) -> Any:
    return fused(family, adapter=adapter or {}, **changes).to(torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi3"])
def test_a_small_model_on_a_gpu_uses_them(family: str, card: None) -> None:
    targets = {"target_modules": PHI3} if family == "phi3" else {}
    choice = graphs_there(model(family, adapter=targets), arguments(), plan())
    assert choice.tokens == 4000
    assert str(choice) == (
        "for parts of at most 4,000 tokens: below that the GPU would wait for its host to launch kernels"
    )


@pytest.mark.parametrize(
    ("arguments_", "plan_", "reason"),
    [
        ({"device": torch.device("cpu")}, {}, "there is no GPU"),
        ({"world_size": 2}, {}, "several processes sum gradients"),
        ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha draws other noise in every step"),
        ({"deepspeed": "zero2.json"}, {}, "deepspeed has its own way through a step"),
        ({"torch_empty_cache_steps": 4}, {}, "torch_empty_cache_steps has its own way through a step"),
        ({"optim": "adalomo"}, {}, "the optimizer updates weights in the middle of the backward pass"),
        ({}, {"policies": (Policy.NONE, Policy.OFFLOAD)}, "inputs of layers go to host memory and back"),
        ({}, {"host_bound": 255}, "the GPU computes longer than it takes to launch its kernels"),
        ({}, {"budget": 959}, "their memory, 0 MiB, does not fit beside what is planned"),
    ],
)
def test_what_speaks_against_them_is_said(
    arguments_: dict[str, Any], plan_: dict[str, Any], reason: str, card: None
) -> None:
    choice = graphs_there(model(), arguments(**arguments_), plan(**plan_))
    assert choice.tokens == 0 and str(choice) == f"none: {reason}"


def test_their_memory_is_that_of_their_largest_part(card: None) -> None:
    assert graphs_there(model(), arguments(), plan(budget=960)).tokens
    assert graphs_there(model(), arguments(), plan(budget=None)).tokens
    smaller = graphs_there(model(), arguments(), plan(budget=930, host_bound=2000))
    assert smaller.tokens == 2000 and not graphs_there(model(), arguments(), plan(budget=929, host_bound=2000)).tokens


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {}, "torch's flash attention has no softcap"),
        ("llama", {"adapter": {"lora_dropout": 0.1}}, "dropout draws other numbers in every step"),
        ("llama", {"attention_dropout": 0.1}, "dropout draws other numbers in every step"),
        ("qwen3", {"head_dim": 12}, "heads of 12; a multiple of 8 up to 256 is needed"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "the frequencies of the rotary embedding depend on the longest document",
        ),
    ],
)
def test_what_of_a_model_speaks_against_them(family: str, changes: dict[str, Any], reason: str, card: None) -> None:
    assert graphs_there(model(family, **changes), arguments(), plan()) == graphs.GraphChoice(0, reason)


def test_in_float32_the_attention_is_plain_torch(card: None) -> None:
    choice = graphs_there(fused(adapter={}), arguments(), plan())
    assert choice.reason == "flash attention computes in 16 bits, not in torch.float32"


def test_layers_of_transformers_speak_against_them(card: None) -> None:
    unknown = tiny.tiny_model("mixtral")
    assert graphs_there(unknown, arguments(), plan()).reason == "decoder layers run as transformers wrote them"
    noted = model()
    engine_of(noted).note("a test")  # type: ignore[union-attr]
    assert graphs_there(noted, arguments(), plan()).reason.endswith("as transformers wrote them: a test")


def test_weights_elsewhere_speak_against_them(card: None) -> None:
    split = model()
    split.get_base_model().lm_head.to("meta")
    assert graphs_there(split, arguments(), plan()).reason == "the weights lie on several devices"


def test_an_old_card_speaks_against_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "missing", lambda device: "a test")
    assert graphs_there(model(), arguments(), plan()).reason == "a test"


def test_a_quantized_base_speaks_against_them(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "is_quantized", lambda module: isinstance(module, torch.nn.Linear))
    reason = graphs_there(model(), arguments(), plan()).reason
    assert reason == "the base is in 4 or 8 bits, which has not been tried"


# ---- in a trainer ----

SETTINGS: dict[str, Any] = {
    "rows": 24, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 6, "seed": 3,
    "save_strategy": "no",
}  # fmt: skip


def own_model() -> Any:
    return adapted(fused()).double()


def recorded(trainer: Any) -> Any:
    trainer.graphs = GraphRunner(trainer.head, trainer.model, PlainRecorder(), most_tokens=4096)
    return trainer


def test_a_run_through_recordings_learns_what_another_run_learns(tmp_path: Path) -> None:
    found: list[dict[str, torch.Tensor]] = []
    losses: list[list[float]] = []
    for name in ("plain", "recorded"):
        trainer = support.trainer(tmp_path / name, model=own_model(), eval_dataset=tiny.chat_rows(4), **SETTINGS)
        if name == "recorded":
            recorded(trainer)
        trainer.train()
        found.append(support.trainable(trainer.model))
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        used = trainer.graphs
    assert used.replayed > 5 and used.launched > 0 and used.off is None
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and len(losses[0]) == 6
    assert_same(found[1], found[0], 1e-7)
    assert used.recorded == 0  # given back at the end


def test_whoever_has_a_loss_of_his_own_is_not_recorded(tmp_path: Path) -> None:
    class Own(SFTTrainer):
        def compute_loss(self, *given: Any, **settings: Any) -> Any:
            return 2 * super().compute_loss(*given, **settings)

    trainer = support.trainer(tmp_path, model=own_model(), **SETTINGS)
    trainer.__class__ = Own
    recorded(trainer).train()
    assert trainer.graphs.launched == trainer.graphs.replayed == 0


def test_on_a_cpu_there_are_none(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, model=own_model(), **SETTINGS)
    assert trainer.graphs is None and str(trainer.graph_choice) == "none: there is no GPU"


def test_a_loss_through_logits_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = support.trainer(tmp_path, model=own_model(), **SETTINGS)
    monkeypatch.setattr(graphs, "graphs_there", lambda *given: graphs.GraphChoice(512, "a test"))
    made: list[Any] = []
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: made.append(device) or PlainRecorder())
    choice, runner = graphs.graphs_of(trainer)
    assert choice.tokens == 512 and isinstance(runner, GraphRunner) and made == [trainer.args.device]
    trainer.head.skips_logits = False
    choice, runner = graphs.graphs_of(trainer)
    assert choice.tokens == 0 and runner is None and "without logits" in choice.reason
