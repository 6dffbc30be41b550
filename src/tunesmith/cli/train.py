"""``tunesmith train``: settings from a file and flags, a run, its progress and its result."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.console import print_lines, silence_libraries
from tunesmith.cli.flags import check_config, given_settings, settings_flags
from tunesmith.core.tasks import CAUSAL_LM
from tunesmith.models.aliases import find_model
from tunesmith.training.settings import RunSettings, load_run_settings

if TYPE_CHECKING:
    from tunesmith.training.run import RunResult

__all__ = ["command", "train_and_show"]


@settings_flags()
def command(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file with settings; flags override it.", show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting by its name or another tool's; may be repeated."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in output_dir from its newest whole checkpoint.")
    ] = False,
    **flags: Any,
) -> None:
    """Train on rows: an adapter, or all weights. Every setting is a flag, a switch also as --no-NAME.

    `tunesmith explain NAME` says what a setting means. The run's folder holds settings, ledger, metrics, checkpoints
    and the result.
    """
    check_config(config)
    settings, aliases = load_run_settings(config, given_settings(flags, assignments or ()))
    print_lines(aliases)
    result = train_and_show(settings, resume=resume)
    from tunesmith.cli.report import print_result

    if result.was_finished:
        state = result.trainer.state
        print_lines([f"the run was finished: {state.global_step} of {state.max_steps} steps; nothing was left to do"])
    print_result(result, _next_commands(settings, result))


def train_and_show(settings: RunSettings, *, resume: bool = False) -> RunResult:
    """Run ``settings`` with ledger, banner and progress on the screen.

    Raises:
        typer.Exit: with code 130, after Ctrl-C; what was done is saved and the command to go on is printed.
    """
    # A mistyped name is said at once, not after the seconds that the libraries take to load.
    find_model(settings.model)
    silence_libraries()
    from tunesmith.cli.progress import StepProgress
    from tunesmith.cli.report import resume_command
    from tunesmith.training.run import run_training

    with StepProgress() as progress:
        result = run_training(settings, resume=resume, callbacks=[progress], on_ready=_introduce)
    if result.interrupted:
        print_lines(
            [
                f"stopped after step {result.numbers['steps']}, saved; continue with:",
                f"  {resume_command(result.folder)}",
            ]
        )
        raise typer.Exit(130)
    return result


def _introduce(trainer: Any) -> None:
    """Print the banner, and take off transformers' own progress, in whose place ours stands."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from tunesmith.cli.report import print_banner

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    print_banner(trainer)


def _next_commands(settings: RunSettings, result: RunResult) -> list[str]:
    folder, data = shlex.quote(str(result.folder)), shlex.quote(settings.eval_data or "ROWS")
    if settings.task != CAUSAL_LM:
        return [f"tunesmith evaluate --model {folder} --data {data}"]
    return [
        f"tunesmith chat {folder}",
        f"tunesmith evaluate --model {folder} --data {data} --metric exact_match",
    ]
