"""What happens beside the steps: metrics on disk, a loss plot, a word about overfitting, a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import logging
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from tunesmith.core.files import as_output_error, damage, write_text

if TYPE_CHECKING:
    from tunesmith.training.config import SFTConfig

__all__ = ["InterruptWatch", "MetricsFile", "OverfitWatch", "default_callbacks", "loss_plot"]

_log = logging.getLogger(__name__)
_SAME_PRESS_S = 2.0


def default_callbacks(config: SFTConfig) -> list[TrainerCallback]:
    """Return the callbacks that every run gets."""
    callbacks: list[TrainerCallback] = [MetricsFile(), EvaluateAtEnd(), KeepBest(), OverfitWatch()]
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStop(config.early_stopping_patience))
    return callbacks


class MetricsFile(TrainerCallback):
    """One JSON line per log in ``metrics.jsonl``; a resumed run first cuts what it is about to repeat."""

    def __init__(self) -> None:
        self._closing: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step that training goes on from."""
        file = Path(args.output_dir) / "metrics.jsonl"
        if state.is_world_process_zero and file.exists():
            lines = file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= state.global_step]
            is_closed = len(lines) == len(kept) + 1 and "train_runtime" in lines[-1]
            self._closing = lines[-1] if is_closed else None
            write_text(file, "".join(line + "\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            file = Path(args.output_dir) / "metrics.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"step": state.global_step, **logs})
            # A run that had no step left to take closes as it did: its seconds are those of nothing.
            if self._closing is not None and "train_runtime" in logs:
                line = self._closing
            self._closing = None
            with as_output_error(file), file.open("a", encoding="utf-8") as out:
                out.write(line + "\n")


def _step_of(line: str) -> float:
    """Return the step of a metrics line; one that a crash cut short, and the closing line, count as later than all."""
    try:
        entry = json.loads(line)
        return float("inf") if "train_runtime" in entry else entry["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class EvaluateAtEnd(TrainerCallback):
    """The last step is evaluated and saved too, so that the best checkpoint is the best of all."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """End a run at once that goes on from its last step."""
        control.should_training_stop |= 0 < state.max_steps <= state.global_step
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for both at the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
            control.should_save = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
        return control


class KeepBest(TrainerCallback):
    """Every step with the lowest eval loss so far is saved, and is found again when the run's folder has moved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Point to the best checkpoint where it is now."""
        if not state.best_global_step:
            return
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        broken = damage(best)
        state.best_model_checkpoint = None if broken else str(best)
        if broken and args.load_best_model_at_end:
            _log.warning("The best step so far, %s, is gone (%s): the result is the best from here on.", best, broken)
            state.best_global_step = state.best_metric = None

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> Any:
        """Ask for a checkpoint of a new best step."""
        loss = (metrics or {}).get("eval_loss")
        if args.load_best_model_at_end and loss is not None:
            control.should_save = control.should_save or state.best_metric is None or loss < state.best_metric
        return control


class EarlyStop(TrainerCallback):
    """Stops when the eval loss has not fallen for ``patience`` evaluations.

    Counts in the log history, which checkpoints keep, so that a resumed run stops where a straight one would.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop at once where the run that goes on had been stopped."""
        return self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop, and say at which step the best loss was."""
        losses = [(entry["eval_loss"], entry["step"]) for entry in state.log_history if "eval_loss" in entry]
        best = min(range(len(losses)), key=lambda index: losses[index][0], default=0)
        if len(losses) - 1 - best >= self.patience:
            control.should_training_stop = True
            _log.warning(
                "Stopping early: the eval loss has not fallen for %d evaluations since step %d (%.4f).",
                self.patience, losses[best][1], losses[best][0],
            )  # fmt: skip
        return control


class OverfitWatch(TrainerCallback):
    """Says in words when the eval loss rises while the training loss falls."""

    def __init__(self) -> None:
        self.said = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the last three evaluations and the training losses between them."""
        advice = overfitting(state.log_history)
        if advice is not None and not self.said:
            self.said = True
            _log.warning("%s", advice)


def overfitting(history: list[dict[str, Any]]) -> str | None:
    """Return advice when the last two evaluations were each worse than the one before and training still improves.

    ``history`` is the Trainer's log history. A rise below 1 % of the best loss is noise.
    """
    evals = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if len(evals) < 3:
        return None
    (first_step, first), (middle_step, middle), (last_step, last) = evals[-3:]
    best_step, best = min(evals, key=lambda entry: entry[1])
    if not (first < middle < last and last > 1.01 * best):
        return None
    early = [entry["loss"] for entry in history if "loss" in entry and first_step < entry["step"] <= middle_step]
    late = [entry["loss"] for entry in history if "loss" in entry and middle_step < entry["step"] <= last_step]
    if not early or not late or sum(late) / len(late) >= sum(early) / len(early):
        return None
    return (
        f"Overfitting: since step {best_step} the eval loss rose from {best:.4f} to {last:.4f} while the training loss "
        "fell. Try fewer epochs (num_train_epochs), a lower rank (r), lora_dropout 0.05 to 0.1, or more rows. The best "
        "step is kept."
    )


class InterruptWatch(TrainerCallback):
    """Ctrl-C ends the run after the step in progress and saves it; a second one stops at once.

    Several processes stop together: each tells the others (:meth:`agree`) at the start of a step. They may hear of one
    Ctrl-C twice, from the terminal and from torchrun, so that there a second one soon after the first is the same.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._agreed = False
        self._processes = 1
        self._heard_at = 0.0
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen for Ctrl-C where the main thread trains."""
        self.interrupted = self._agreed = False
        self._processes = args.world_size
        try:
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        except ValueError:  # Not the main thread: its owner decides what Ctrl-C means.
            self._previous = None

    def agree(self, any_process: bool) -> None:
        """Take note that Ctrl-C was pressed in some process."""
        self._agreed = any_process
        self.interrupted |= any_process

    @property
    def is_stopping(self) -> bool:
        """Whether the run is to end after this step, alike on all processes."""
        return self._agreed or (self.interrupted and self._processes == 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save and stop where Ctrl-C was pressed."""
        if self.is_stopping:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give Ctrl-C back."""
        self.release()

    def release(self) -> None:
        """Give Ctrl-C back to whoever had it before; does nothing the second time."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _on_signal(self, number: int, frame: Any) -> None:
        again = self._processes > 1 and time.monotonic() - self._heard_at < _SAME_PRESS_S
        if self.interrupted and not again:
            raise KeyboardInterrupt
        self._heard_at = time.monotonic()
        if self.interrupted:
            return
        self.interrupted = True
        _log.warning("Stopping after this step; the state is saved. Press Ctrl-C again to stop at once.")


def loss_plot(history: list[dict[str, Any]], file: Path) -> None:
    """Write a picture of training and eval loss over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="loss per trained token")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(file)
