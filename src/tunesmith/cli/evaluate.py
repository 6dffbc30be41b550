"""``tunesmith evaluate``: a metric over rows, the base beside the tuned model."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from tunesmith.cli.console import console, print_lines, silence_libraries
from tunesmith.cli.flags import given_settings, settings_flags
from tunesmith.cli.words import amount
from tunesmith.core.errors import OutputError, SettingsError
from tunesmith.core.files import write_text
from tunesmith.core.tasks import CAUSAL_LM

if TYPE_CHECKING:
    from tunesmith.evaluation import Report, Side

__all__ = ["AnswerProgress", "command"]


@settings_flags(["map", "chat_template", "dtype", "load_in_4bit", "load_in_8bit", "load_in_fp8", "load_in_16bit"])
def command(
    model: Annotated[str, typer.Option(help="Folder, run, .gguf file, hub id or built-in name.", show_default=False)],
    data: Annotated[
        str, typer.Option(help="Rows with answers; of a folder the test, valid or train file.", show_default=False)
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            help="exact_match, json_match, contains, regex, label_f1 or perplexity; a model for another task than "
            "CAUSAL_LM has figures of its own.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter folder or run to put on the model.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many usable rows.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Answers generated together.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seeds sampling and the bootstrap.")] = 3407,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Score the model without its adapter too.")] = True,
    output: Annotated[
        Path | None, typer.Option(help="New JSON file for all figures and every answer.", show_default=False)
    ] = None,
    **flags: Any,
) -> None:
    """Score a model on rows, with a 95 % interval. With an adapter its base is scored on the same rows beside it."""
    given = given_settings(flags)
    if output is not None and output.exists():
        raise OutputError(f"--output {output} exists already and is not overwritten. Give another path.")
    if output is not None and not output.absolute().parent.is_dir():
        raise OutputError(f"--output {output}: the folder {output.absolute().parent} does not exist. Make it first.")
    generating = {"--temperature": temperature, "--max-new-tokens": max_new_tokens != 256}
    if metric == "perplexity":
        what = "perplexity, which generates nothing and takes one row at a time"
        _refuse_idle({**generating, "--batch-size": batch_size != 32}, what)
    silence_libraries()  # the imports below have something to say of this machine
    from tunesmith.cli.loading import load_for_answers, mapping_of_run
    from tunesmith.cli.task_scores import print_scores, score_task
    from tunesmith.evaluation import evaluate
    from tunesmith.evaluation.metrics import METRICS, get_metric
    from tunesmith.models.load import facts_of

    if metric is not None:
        get_metric(metric)
    loading = {name: value for name, value in given.items() if name != "map"}
    loaded, tokenizer = load_for_answers(model, adapter, any_task=True, **loading)
    mapping = given.get("map") or mapping_of_run(adapter or model, data)
    if mapping is not None and "map" not in given:
        print_lines([f"columns are read as in the run: --map {','.join(f'{c}={r}' for c, r in mapping.items())}"])
    if facts_of(loaded).task != CAUSAL_LM:
        _refuse_idle({"--metric": metric, **generating}, facts_of(loaded).task)
        with AnswerProgress() as progress:
            scores = score_task(
                loaded, tokenizer, data, mapping, limit=limit, batch_size=batch_size, base=base,
                progress=progress,
            )  # fmt: skip
        print_scores(scores)
        if output is not None:
            figures = {"model_name": model, "adapter": adapter, "data": data, **scores.as_dict()}
            _write(output, figures)
        return
    if metric is None:
        raise SettingsError(f"--metric is missing. Metrics are: {', '.join(METRICS)}.")
    with AnswerProgress() as progress:
        report = evaluate(
            loaded,
            tokenizer,
            data,
            metric,
            mapping=mapping,
            limit=limit,
            with_base=base,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            seed=seed,
            progress=progress,
        )
    _print_report(report)
    if output is not None:
        about = {"model_name": model, "adapter": adapter, "data": data, "seed": seed, "max_new_tokens": max_new_tokens}
        _write(output, {**about, **report.as_dict(), "rows": list(report.row_dicts())})


def _refuse_idle(flags: dict[str, Any], what: str) -> None:
    idle = [flag for flag, is_given in flags.items() if is_given]
    if idle:
        raise SettingsError(f"{', '.join(idle)}: without effect on {what}. Leave it out.")


def _write(output: Path, figures: dict[str, Any]) -> None:
    write_text(output, json.dumps(figures, ensure_ascii=False, indent=1) + "\n")
    print_lines([f"written: {output}"])


class AnswerProgress:
    """Rows done, on stderr: a live line a model in a terminal, one line a model in a pipe. Use it as a context."""

    def __init__(self) -> None:
        out = console(stderr=True)
        columns = (TextColumn("{task.description:<8}"), BarColumn(bar_width=24), MofNCompleteColumn())
        self._console = out
        self._bar = Progress(*columns, TimeRemainingColumn(), console=out, disable=not out.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        """Start the display."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the display."""
        self._bar.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` rows of the model ``label`` are scored."""
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(label, total=total)
        self._bar.update(self._tasks[label], completed=done)
        if done == total and not self._console.is_terminal:
            self._console.print(f"{label}: {total} rows scored")


def _print_report(report: Report) -> None:
    is_share = report.metric != "perplexity"
    table = Table(title=f"{report.metric} on {len(report.rows):,} rows", title_justify="left", box=None, pad_edge=False)
    for name in ("", "value", "95 % interval", *(["rows right"] if is_share else []), "tokens/s", "seconds"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    sides = {"base": report.base, "model" if report.base is None else "tuned": report.tuned}
    for name, side in sides.items():
        if side is not None:
            table.add_row(name, *_side(side, is_share=is_share))
    console().print(table)
    for name, figure in report.tuned.score.details.items():
        beside = "" if report.base is None else f", base {_figure(report.base.score.details[name], is_share)}"
        print_lines([f"{name}: {_figure(figure, is_share)}{beside}"])
    if report.difference is not None:
        found = report.difference
        value, low, high = (_figure(figure, is_share) for figure in (found.value, found.low, found.high))
        counts = f"better on {found.wins:,} rows, worse on {found.losses:,}"
        print_lines([f"tuned - base: {value} (95 % from {low} to {high}); {counts}"])
    print_lines(f"left out: {count:,} rows, {reason}" for reason, count in report.refused.items())


def _side(side: Side, *, is_share: bool) -> list[str]:
    score = side.score
    interval = f"{_figure(score.low, is_share)} to {_figure(score.high, is_share)}"
    right = [f"{sum(score.per_row):,.0f} of {score.count:,}"] if is_share else []
    speed = amount(side.tokens / side.seconds) if side.seconds > 0 and side.tokens else ""
    return [_figure(score.value, is_share), interval, *right, speed, f"{side.seconds:,.1f}"]


def _figure(value: float, is_share: bool) -> str:
    return f"{100 * value:.1f} %" if is_share else f"{value:,.4g}"
