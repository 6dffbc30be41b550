"""A run's steps on the screen: one live line in a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from transformers import TrainerCallback

from tunesmith.cli.console import console, print_lines
from tunesmith.cli.words import amount, bytes_in_words, duration

__all__ = ["StepProgress"]

_LINES = 50
"""Most lines of a run in a pipe, evaluations not counted."""
_WIDE = 110
"""Columns from which a bar has room beside the figures."""


class StepProgress(TrainerCallback):
    """Show step, loss, learning rate, gradient norm, tokens/s, time left and peak memory.

    Use it as a context, so that the live line ends with the block whatever happens in it, and hand it to the trainer
    as a callback.
    """

    def __init__(self) -> None:
        self._console = console()
        self._is_live = self._console.is_terminal
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = 0.0
        self._first_step = 0
        self._last_shown = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the live line."""
        self._stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and, in a terminal, the live line."""
        self._began, self._first_step = time.perf_counter(), state.global_step
        self._console.rule("training", align="left", style="dim")
        if self._is_live:
            # A narrow terminal has no room for a bar, and cuts off the end of the line rather than wrap it.
            bar = [BarColumn(bar_width=20)] if self._console.width >= _WIDE else []
            one_line = Column(no_wrap=True, overflow="ellipsis")
            live = Progress(
                *bar, TextColumn("{task.description}", markup=False, table_column=one_line), console=self._console
            )
            live.start()
            start = f"{state.global_step}/{state.max_steps}  first step ..."
            self._task = live.add_task(start, total=state.max_steps, completed=state.global_step)
            self._bar = live

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show a line of training metrics, or one of an evaluation."""
        logs = logs or {}
        if "eval_loss" in logs:
            named = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
            loss = named.pop("loss")
            others = [f"{name} {value:.4g}" for name, value in named.items() if name not in ("runtime", "tokens")]
            self._print("  ".join([f"eval  step {state.global_step}", f"loss {loss:.4f}", *others]))
        elif "loss" in logs:
            self._show_step(state, logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the live line."""
        self._stop()

    def _show_step(self, state: Any, logs: dict[str, Any]) -> None:
        line = self._line(state, logs)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=line)
            return
        is_due = state.global_step - self._last_shown >= state.max_steps / _LINES
        if is_due or state.global_step in (1, state.max_steps):
            self._last_shown = state.global_step
            self._print(line)

    def _line(self, state: Any, logs: dict[str, Any]) -> str:
        done = state.global_step - self._first_step
        left = (time.perf_counter() - self._began) / max(done, 1) * (state.max_steps - state.global_step)
        parts = [f"{state.global_step}/{state.max_steps}", f"loss {logs['loss']:.3f}"]
        if "learning_rate" in logs:
            parts.append(f"lr {logs['learning_rate']:.1e}")
        if logs.get("grad_norm") is not None:
            parts.append(f"grad {float(logs['grad_norm']):.2f}")
        # What matters least comes last: a narrow terminal cuts it off.
        parts += [f"{amount(logs['tokens_per_s'])} tok/s", f"{duration(left)} left" if left else "done"]
        parts.append(bytes_in_words(logs["peak_bytes"]))
        return "  ".join(parts)

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            print_lines([line])

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
