"""``tunesmith plan``: what a run would need and how it would fit, before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tunesmith.cli.console import console, print_lines, silence_libraries
from tunesmith.cli.flags import check_config, given_settings, settings_flags
from tunesmith.cli.words import amount, bytes_in_words, duration
from tunesmith.core.errors import NotSupportedYetError
from tunesmith.core.memory import parse_bytes
from tunesmith.core.tasks import CAUSAL_LM
from tunesmith.models.aliases import find_model
from tunesmith.training.settings import RunSettings, load_run_settings

if TYPE_CHECKING:
    from tunesmith.memory import Probe, TrainingPlan
    from tunesmith.training.preview import Preview

__all__ = ["command"]

_MEANING = {
    "libraries": "Python, the libraries and the data, on a CPU",
    "base": "frozen weights",
    "adapter": "trained weights",
    "gradients": "of the trained weights",
    "optimizer": "its states",
    "dense": "quantized weights that stay written out",
    "codes": "4-bit codes of weights that train",
    "scratch": "buffers that all layers share",
    "kept": "what layers keep for the backward pass",
    "layer": "backward of one layer",
    "head": "hidden states and logits of one chunk",
}

_MOMENTS = {
    "load": "while the model is loaded",
    "save": "while a checkpoint is written",
    "evaluation": "while it evaluates",
}


@settings_flags()
def command(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file with settings; flags override it.", show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting by its name or another tool's; may be repeated."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Plan for a machine with so much, for example 8GiB.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model and measure a step on the longest batch.")
    ] = False,
    **flags: Any,
) -> None:
    """Predict a run: bytes by part, what the backward pass keeps, micro-batch, disk; with --probe also its speed.

    Takes the settings of `train`. Reads the rows and the headers of the weight files; loads no weights.
    """
    size = None if memory is None else parse_bytes(memory)
    check_config(config)
    settings, aliases = load_run_settings(config, given_settings(flags, assignments or ()))
    if settings.task != CAUSAL_LM:
        raise NotSupportedYetError(f"a plan for {settings.task} is not supported yet: memory is planned for CAUSAL_LM.")
    print_lines(aliases)
    # A mistyped name is said at once, not after the seconds that the libraries take to load.
    find_model(settings.model)
    silence_libraries()
    from tunesmith.cli.report import facts_table, print_ledger
    from tunesmith.training.preview import preview

    found = preview(settings, memory=size)
    print_ledger(found.ledger)
    out = console()
    out.rule("memory", align="left", style="dim")
    out.print(_parts_table(found.plan))
    out.rule("plan", align="left", style="dim")
    out.print(facts_table(_facts(found, is_asked=size is not None)))
    out.print(_alternatives_table(found.plan))
    out.rule("disk", align="left", style="dim")
    rows = [(name, bytes_in_words(count)) for name, count in found.disk.items()]
    out.print(facts_table([*rows, ("free", bytes_in_words(found.disk_free))]))
    if probe:
        _print_probe(found, settings)


def _print_probe(found: Preview, settings: RunSettings) -> None:
    from tunesmith.cli.report import facts_table
    from tunesmith.training.preview import probe_settings

    measured: Probe = probe_settings(settings, found.plan)
    seconds = found.tokens_an_epoch / measured.tokens_per_s
    predicted = bytes_in_words(found.plan.peak - found.plan.parts.get("optimizer", 0))
    console().rule("probe", align="left", style="dim")
    rows = [
        ("longest batch", f"{measured.tokens:,} tokens in {duration(measured.seconds)}"),
        ("speed", f"{amount(measured.tokens_per_s)} tokens/s"),
        ("an epoch", f"{duration(seconds)} for {found.tokens_an_epoch:,} tokens, evaluation and saving not counted"),
        ("peak memory", f"{bytes_in_words(measured.peak)}; {predicted} were predicted without the optimizer's states"),
    ]
    console().print(facts_table(rows))


def _parts_table(plan: TrainingPlan) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold", style="dim")
    for name, size in plan.parts.items():
        table.add_row(name, bytes_in_words(size), _MEANING[name])
    table.add_row("a step", bytes_in_words(sum(plan.parts.values())), "their sum", end_section=True)
    for name, size in plan.phases.items():
        table.add_row(name, bytes_in_words(size), _MOMENTS[name])
    table.add_row("peak", bytes_in_words(plan.peak), "the largest of these moments")
    return table


def _facts(found: Preview, *, is_asked: bool) -> list[tuple[str, str]]:
    plan = found.plan
    stored = ", ".join(f"{bytes_in_words(size)} of {dtype}" for dtype, size in found.stored.items())
    rows = [
        ("weights", f"{found.dtype}{f'; stored: {stored}' if stored else ''}"),
        ("memory", f"{bytes_in_words(found.memory)} {'asked for' if is_asked else 'can be had here'}"),
        ("predicted peak", f"{bytes_in_words(plan.peak)}, {100 * plan.peak / found.memory:.0f} % of it"),
        ("checkpointing", f"{plan.describe()}: {plan.reason}"),
        (
            "together",
            f"{plan.together()}; the largest part has {plan.tokens:,}, the longest row {found.work.longest:,}",
        ),
    ]
    if found.graphs is not None:
        rows.append(("CUDA graphs", str(found.graphs)))
    return rows if plan.advice is None else [*rows, ("does not fit", plan.advice)]


def _alternatives_table(plan: TrainingPlan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("also looked at", overflow="fold")
    table.add_column("tokens together", justify="right")
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("")
    for other in plan.alternatives:
        tokens = "all" if other.part_tokens is None else f"{other.part_tokens:,}"
        fits = Text("" if other.fits else "too much", style="red")
        table.add_row(other.policies, tokens, bytes_in_words(other.peak), f"x {other.slowdown:.2f}", fits)
    return table
