from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.training import support
from transformers import EarlyStoppingCallback, TrainerCallback

from tunesmith.training.callbacks import EarlyStop, InterruptWatch, MetricsFile, loss_plot, overfitting
from tunesmith.training.checkpoint import checkpoints_in


def history(evals: list[float], training: list[float]) -> list[dict[str, Any]]:
    """One training loss before each evaluation but the first."""
    entries: list[dict[str, Any]] = []
    for index, value in enumerate(evals):
        if index:
            entries.append({"step": 10 * index + 5, "loss": training[index - 1]})
        entries.append({"step": 10 * index + 10, "eval_loss": value})
    return entries


def test_overfitting_is_said_in_words_with_what_to_try() -> None:
    advice = overfitting(history([1.0, 0.8, 0.9, 1.0], [0.7, 0.5, 0.4]))
    assert advice is not None
    assert "since step 20 the eval loss rose from 0.8000 to 1.0000 while the training loss fell" in advice
    for remedy in ("num_train_epochs", "(r)", "lora_dropout", "more rows"):
        assert remedy in advice


@pytest.mark.parametrize(
    ("evals", "training"),
    [
        ([1.0, 1.1], [0.5]),  # two evaluations prove nothing
        ([1.0, 0.9, 0.8], [0.7, 0.6]),  # falling
        ([0.8, 0.9, 0.85], [0.7, 0.6]),  # one rise only
        ([0.8, 0.8001, 0.8002], [0.7, 0.6]),  # noise
        ([0.8, 0.9, 1.0], [0.6, 0.7]),  # training worsens too: diverging, not overfitting
        ([1.0, 0.5, 0.5, 0.5], [0.7, 0.6, 0.5]),  # flat
    ],
)
def test_what_is_no_overfitting(evals: list[float], training: list[float]) -> None:
    assert overfitting(history(evals, training)) is None


def test_overfitting_needs_training_losses() -> None:
    assert overfitting([entry for entry in history([0.8, 0.9, 1.0], [0.6, 0.5]) if "loss" not in entry]) is None


@pytest.mark.parametrize(
    ("evals", "patience", "stops"),
    [([1.0, 0.9, 0.95, 0.96], 2, True), ([1.0, 0.9, 0.95, 0.96], 3, False), ([1.0, 0.9, 0.95, 0.8], 1, False),
     ([1.0, 1.0], 1, True), ([1.0], 1, False)],
)  # fmt: skip
def test_early_stopping_counts_evaluations_since_the_best(evals: list[float], patience: int, stops: bool) -> None:
    control = SimpleNamespace(should_training_stop=False)
    state = SimpleNamespace(log_history=history(evals, [0.0] * len(evals)))
    EarlyStop(patience).on_evaluate(None, state, control)
    assert control.should_training_stop == stops


def begin(callback: Any, folder: Path, step: int) -> None:
    callback.on_train_begin(
        SimpleNamespace(output_dir=str(folder), world_size=1),
        SimpleNamespace(is_world_process_zero=True, global_step=step),
        None,
    )


def test_a_resumed_run_cuts_the_lines_it_repeats(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 2.5},
        {"step": 3, "loss": 1.0},
        {"step": 3, "train_runtime": 9.0},
    ]
    file = tmp_path / "metrics.jsonl"
    # The last line was being written when the process died.
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo', encoding="utf-8")
    begin(MetricsFile(), tmp_path, 2)
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == lines[:3]
    begin(MetricsFile(), tmp_path, 0)
    assert file.read_text(encoding="utf-8") == ""


def test_other_processes_write_no_metrics(tmp_path: Path) -> None:
    state = SimpleNamespace(is_world_process_zero=False, global_step=1)
    MetricsFile().on_log(SimpleNamespace(output_dir=str(tmp_path)), state, None, logs={"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_ctrl_c_asks_for_a_clean_stop_once_and_is_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    watch = InterruptWatch()
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    begin(watch, tmp_path, 0)
    watch.on_step_end(None, None, control)
    assert not control.should_training_stop
    signal.raise_signal(signal.SIGINT)
    watch.on_step_end(None, None, control)
    assert control.should_training_stop and control.should_save
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    watch.release()
    assert signal.getsignal(signal.SIGINT) is before
    # The same trainer may train again.
    begin(watch, tmp_path, 0)
    assert not watch.interrupted
    watch.release()


class Press(TrainerCallback):
    """Ctrl-C in step 3."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("steps", "ends"), [(3, True), (4, False)])
def test_ctrl_c_in_the_last_step_ends_nothing_early(steps: int, ends: bool, tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, max_steps=steps, callbacks=[Press()])
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.interrupted != ends


def test_ctrl_c_saves_a_step_that_is_not_the_best(tmp_path: Path) -> None:
    trainer = support.trainer(
        tmp_path, rows=20, eval_dataset=tiny.chat_rows(4, seed=2), eval_steps=1, save_strategy="best",
        learning_rate=1e-30, callbacks=[Press()],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-1", "checkpoint-3"]


def test_processes_stop_together(tmp_path: Path) -> None:
    """Ctrl-C stops a process only once all have heard of it, and the same press twice is one press."""
    watch = InterruptWatch()
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    begin(watch, tmp_path, 0)
    watch._processes = 2
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    watch.on_step_end(None, None, control)
    assert not control.should_training_stop
    watch.agree(True)
    watch.on_step_end(None, None, control)
    assert control.should_training_stop and control.should_save
    watch.release()


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "loss.png"
    loss_plot(history([1.0, 0.9], [0.5]), file)
    assert file.read_bytes().startswith(b"\x89PNG")
    loss_plot([], file)
    assert file.read_bytes().startswith(b"\x89PNG")


# ---- what every step costs beside its arithmetic ----


def test_a_step_walks_over_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[int] = []

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        walks.append(1)
        return original(module, *args, **kwargs)

    original = torch.nn.Module.named_modules
    counts: list[int] = []
    for steps in (2, 6):
        run = support.trainer(tmp_path / str(steps), max_steps=steps, save_strategy="no", max_grad_norm=0.1)
        expected = run.floating_point_ops({"input_ids": torch.zeros(3, 7)})
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "named_modules", counted)
            walks.clear()
            run.train()
        counts.append(len(walks))
        # The Trainer's own ways are back, and count the same.
        assert "zero_grad" not in vars(run.model) and run.state.total_flos > 0
        assert run.floating_point_ops({"input_ids": torch.zeros(3, 7)}) == expected
        with run._walking_once():
            assert run.floating_point_ops({"input_ids": torch.zeros(3, 7)}) == expected
            run.model.zero_grad()
            assert all(parameter.grad is None for parameter in run.model.parameters())
    assert counts[0] == counts[1]


def test_a_run_that_was_stopped_early_does_not_go_on() -> None:
    control = SimpleNamespace(should_training_stop=False)
    state = SimpleNamespace(log_history=history([1.0, 1.1, 1.2], [0.0] * 3))
    EarlyStop(2).on_train_begin(None, state, control)
    assert control.should_training_stop


def test_early_stopping_of_transformers_goes_on_counting(tmp_path: Path) -> None:
    class Rising(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            metrics["eval_loss"] = float(state.global_step)

    def trainer() -> Any:
        return support.trainer(
            tmp_path, rows=40, eval_dataset=tiny.chat_rows(4, seed=2), eval_steps=1, save_steps=1,
            save_total_limit=None, callbacks=[Rising(), EarlyStoppingCallback(4)],
        )  # fmt: skip

    trainer().train()
    assert [path.name for path in checkpoints_in(tmp_path)][-1] == "checkpoint-5"  # the first is the best
    for step in (4, 5):
        (tmp_path / f"checkpoint-{step}" / "manifest.json").unlink()
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
