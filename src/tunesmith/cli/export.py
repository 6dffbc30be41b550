"""``tunesmith export``: a run as a folder that other programs load, compared with the run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.console import print_lines, silence_libraries
from tunesmith.cli.flags import given_settings, settings_flags
from tunesmith.core.errors import OutputError, SettingsError

if TYPE_CHECKING:
    from tunesmith.export.report import ExportReport

__all__ = ["command"]


@settings_flags(["dtype", "load_in_4bit", "load_in_8bit", "load_in_16bit"])
def command(
    model: Annotated[str, typer.Argument(help="Run or adapter folder, or a model.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="New folder for the export. Needed without --push-to.", show_default=False)
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="merged_16bit, merged_32bit, merged_4bit (NF4), lora (the adapter alone), torchao-int8, "
            "torchao-int8-int4, and on GPUs torchao-int4, torchao-fp8-int4 and torchao-fp8-fp8."
        ),
    ] = "merged_16bit",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter folder or run to put on the model. Several are added to each other, each by its share where "
            "one is given: PATH:0.5.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file of a merged model, like 5GB.", show_default=False)
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="Upload the export to the hub: OWNER/NAME.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository of --push-to private.")] = False,
    **flags: Any,
) -> None:
    """Write a model that transformers or PEFT loads, load it in another process and compare it with the run."""
    if output is None and push_to is None:
        raise OutputError("--output FOLDER is missing. Give it, or --push-to OWNER/NAME to upload only.")
    if output is not None and output.exists():
        raise OutputError(f"--output {output} is there already and is not overwritten. Give another folder.")
    if private and push_to is None:
        raise SettingsError("--private is for --push-to OWNER/NAME. Leave it out.")
    mix = [_share(text) for text in adapter or ()]
    silence_libraries()  # what the imports below bring has something to say of this machine
    from tunesmith.cli.loading import add_adapters, load_for_answers
    from tunesmith.export.card import About
    from tunesmith.export.hub import Push, checked
    from tunesmith.export.methods import check_method, export_or_push
    from tunesmith.training.probes import probes_of_run

    check_method(method)
    push = None if push_to is None else checked(Push(push_to, private=private or None))
    loaded, tokenizer = load_for_answers(model, mix[0][0] if mix else None, **given_settings(flags))
    run = Path(mix[0][0] if mix else model)
    prompts = probes_of_run(run, tokenizer)
    how: dict[str, Any] = {"method": method, "prompts": prompts, "max_shard_size": max_shard_size}
    if [share for _, share in mix] not in ([], [1.0]):
        how["adapters"] = add_adapters(loaded, mix)
    how["about"] = About(run=run if len(mix) < 2 else None)
    report = export_or_push(loaded, output, tokenizer, push=push, **how)
    print_lines(_lines(report, len(prompts), kept=output is not None))


def _share(text: str) -> tuple[str, float]:
    """Return path and share of ``PATH`` or ``PATH:SHARE``."""
    found = re.fullmatch(r"(.+):([-+]?\d*\.?\d+)", text)
    return (text, 1.0) if found is None or Path(text).exists() else (found[1], float(found[2]))


def _lines(report: ExportReport, rows: int, *, kept: bool) -> Iterator[str]:
    """Yield what a terminal shows of an export."""
    found = report.comparison
    size = f"{report.size / 2**20:,.0f} MiB of {report.dtype}, {report.seconds:.0f} s"
    yield f"written: {report.folder} ({size})" if kept else f"written for the upload: {size}"
    yield f"loaded by {found.runtime} in another process; on {found.tokens} tokens ({rows} training rows):"
    yield f"KL divergence {found.kl:.2g} nats (at most {found.largest_kl:.2g})"
    if report.moved is not None:
        yield f"for scale: the untuned base is {report.moved:.2g} nats away"
    if found.kept is not None:
        yield f"{found.kept:.1%} of what the training changed is there"
    yield f"the same likeliest token after {found.top1:.1%} of them"
    yield f"perplexity {found.perplexity:.4g}, of the run {found.live_perplexity:.4g}"
    gap = "" if found.text_gap is None else f"; they part where the run chose by {found.text_gap:.2g} nats"
    yield f"{found.equal_texts} of {found.texts} greedy texts are equal{gap}"
    if found.tokenizer is not None:
        yield f"tokenizer and chat template: {found.tokenizer}"
    for name, other in report.comparisons.items():
        if name != report.route:
            yield f"the base is {report.route}: KL divergence {other.kl:.2g} where it is {name}"
    if report.url is not None:
        yield f"uploaded: {report.url}"
