"""TRL's own trainers on an installed model: the losses and gradient norms of the plain model, through our layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.engine.support import counted, fused, plain

from tunesmith.engine.install import engine_of

trl = pytest.importorskip("trl")

LORA: dict[str, Any] = {"target_modules": "all-linear"}
STEPS = 3
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 5,
}


def histories(train: Any, family: str, least: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the logged losses and gradient norms on the installed and on the plain model."""
    found: list[list[dict[str, float]]] = []
    for made in (fused, plain):
        model = made(family, adapter=LORA)
        with counted() as calls:
            trainer = train(model)
            trainer.train()
        if made is fused:
            assert len(calls) >= least * 2 * STEPS, "the fused layers did not run"
            assert engine_of(model).notes == []
        logs = trainer.state.log_history
        found.append([{key: log[key] for key in log if key in ("loss", "grad_norm", "rewards/margins", "kl")}
                      for log in logs if "loss" in log])  # fmt: skip
    ours, theirs = found
    assert len(ours) == STEPS
    return ours, theirs


def assert_equal(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for mine, own in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(own, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sft(family: str, padding_free: bool, tmp_path: Path) -> None:
    from datasets import Dataset

    def trainer(model: Any) -> Any:
        args = trl.SFTConfig(output_dir=str(tmp_path), max_length=None, padding_free=padding_free, **COMMON)
        return trl.SFTTrainer(
            model, args, train_dataset=Dataset.from_list(tiny.chat_rows(16)), processing_class=tiny.tiny_tokenizer()
        )

    assert_equal(*histories(trainer, family, 1))


def test_dpo(tmp_path: Path) -> None:
    """The reference is the same model with its adapter switched off."""
    from datasets import Dataset

    rows = [
        {"prompt": "the cat ", "chosen": f"sat on a mat {'and saw ' * n}", "rejected": f"run {'over ' * (4 - n)}"}
        for n in range(4)
    ] * 3

    def trainer(model: Any) -> Any:
        args = trl.DPOConfig(output_dir=str(tmp_path), max_length=64, **COMMON)
        return trl.DPOTrainer(
            model, None, args, train_dataset=Dataset.from_list(rows), processing_class=tiny.tiny_tokenizer()
        )

    assert_equal(*histories(trainer, "llama", 2))


def test_grpo(tmp_path: Path) -> None:
    """Both sample the same completions: the same seed, and probabilities that differ by rounding only."""
    from datasets import Dataset

    seen: list[list[list[str]]] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        seen[-1].append(completions)
        return [float(sum(map(ord, text)) % 7) for text in completions]

    def trainer(model: Any) -> Any:
        seen.append([])
        args = trl.GRPOConfig(
            output_dir=str(tmp_path), num_generations=4, max_completion_length=8, beta=0.1, temperature=1.0, **COMMON
        )
        return trl.GRPOTrainer(
            model, reward, args, train_dataset=Dataset.from_list([{"prompt": "the cat sat "}] * 12),
            processing_class=tiny.tiny_tokenizer(),
        )  # fmt: skip

    results = histories(trainer, "llama", 1)
    assert len(seen[0]) == STEPS
    assert seen[0] == seen[1]
    assert_equal(*results)
    assert [log["kl"] > 0 for log in results[0]] == [False, True, True]
