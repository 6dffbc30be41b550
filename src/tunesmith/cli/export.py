"""``tunesmith export``: a run as a folder that other programs load, compared with the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.console import print_lines, silence_libraries
from tunesmith.cli.flags import given_settings, settings_flags
from tunesmith.core.errors import OutputError

if TYPE_CHECKING:
    from tunesmith.export.report import ExportReport

__all__ = ["command"]


@settings_flags(["dtype", "load_in_4bit", "load_in_8bit", "load_in_16bit"])
def command(
    model: Annotated[str, typer.Argument(help="Run or adapter folder, or a model.", show_default=False)],
    output: Annotated[Path, typer.Option(help="New folder for the export.", show_default=False)],
    method: Annotated[
        str, typer.Option(help="merged_16bit, merged_32bit, or lora (the adapter alone).")
    ] = "merged_16bit",
    adapter: Annotated[
        str | None, typer.Option(help="Adapter folder or run to put on the model.", show_default=False)
    ] = None,
    **flags: Any,
) -> None:
    """Write a model that transformers or PEFT loads, load it in another process and compare it with the run."""
    if output.exists():
        raise OutputError(f"--output {output} is there already and is not overwritten. Give another folder.")
    silence_libraries()  # what the imports below bring has something to say of this machine
    from tunesmith.cli.loading import load_for_answers
    from tunesmith.export.methods import check_method, export_model
    from tunesmith.training.probes import probes_of_run

    check_method(method)
    loaded, tokenizer = load_for_answers(model, adapter, **given_settings(flags))
    prompts = probes_of_run(Path(adapter or model), tokenizer)
    report = export_model(loaded, output, tokenizer, method=method, prompts=prompts)
    print_lines(_lines(report, len(prompts)))


def _lines(report: ExportReport, rows: int) -> list[str]:
    """Return what a terminal shows of an export."""
    found = report.comparison
    lines = [
        f"written: {report.folder} ({report.size / 2**20:,.0f} MiB of {report.dtype}, {report.seconds:.0f} s)",
        f"loaded by {found.runtime} in another process; on {found.tokens} tokens ({rows} training rows):",
        f"KL divergence {found.kl:.2g} nats (at most {found.largest_kl:.2g})",
        f"the same likeliest token after {found.top1:.1%} of them",
        f"perplexity {found.perplexity:.4g}, of the run {found.live_perplexity:.4g}",
    ]
    for name, other in report.comparisons.items():
        if name != report.route:
            lines.append(f"the base is {report.route}: KL divergence {other.kl:.2g} where it is {name}")
    return lines
