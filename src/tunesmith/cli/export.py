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
from tunesmith.core.files import require_new
from tunesmith.core.names import did_you_mean

if TYPE_CHECKING:
    from tunesmith.export.gguf.save import GgufReport
    from tunesmith.export.report import ExportReport

__all__ = ["command"]


@settings_flags(["dtype", "load_in_4bit", "load_in_8bit", "load_in_fp8", "load_in_16bit"])
def command(
    model: Annotated[str, typer.Argument(help="Run or adapter folder, or a model.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="New folder for the export. Needed without --push-to.", show_default=False)
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="merged_16bit, merged_32bit, merged_4bit (NF4), lora (the adapter alone), torchao-int8, "
            "torchao-int8-int4, on GPUs torchao-int4, torchao-fp8-int4 and torchao-fp8-fp8, gguf_lora, or methods of "
            "GGUF, several by commas: q8_0,q4_k_m."
        ),
    ] = "merged_16bit",
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix for methods of GGUF.", show_default=False)
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter folder or run to put on the model. Several are added to each other, each by its share where "
            "one is given: PATH:0.5.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file of a merged model (default: 5GB).", show_default=False)
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="Upload the export to the hub: OWNER/NAME.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository of --push-to private.")] = False,
    **flags: Any,
) -> None:
    """Write what transformers, PEFT or llama.cpp loads, load it in another process and compare it with the run."""
    if output is None and push_to is None:
        raise OutputError("--output FOLDER is missing. Give it, or --push-to OWNER/NAME to upload only.")
    if output is not None:
        require_new(output)
    if private and push_to is None:
        raise SettingsError("--private is for --push-to OWNER/NAME. Leave it out.")
    mix = [_share(text) for text in adapter or ()]
    silence_libraries()  # what the imports below bring has something to say of this machine
    from tunesmith.cli.loading import add_adapters, load_for_answers
    from tunesmith.export.card import About
    from tunesmith.export.hub import Push, checked
    from tunesmith.export.methods import GGUF_LORA, export_or_push
    from tunesmith.training.probes import probes_of_run

    names = [name.strip().lower() for name in method.split(",")]
    is_gguf = _check(names, imatrix)
    push = None if push_to is None else checked(Push(push_to, private=private or None))
    loaded, tokenizer = load_for_answers(model, mix[0][0] if mix else None, **given_settings(flags))
    run = Path(mix[0][0] if mix else model)
    prompts = probes_of_run(run, tokenizer)
    how: dict[str, Any] = {"method": names if is_gguf else names[0], "prompts": prompts,
                           "max_shard_size": max_shard_size}  # fmt: skip
    if [share for _, share in mix] not in ([], [1.0]):
        how["adapters"] = add_adapters(loaded, mix)
    if is_gguf and imatrix is not None:
        how["imatrix"] = imatrix
    elif not is_gguf and names[0] != GGUF_LORA:
        how["about"] = About(run=run if len(mix) < 2 else None)
    report = export_or_push(loaded, output, tokenizer, push=push, **how)
    tell = _gguf_lines if is_gguf or names[0] == GGUF_LORA else _lines
    print_lines(tell(report, len(prompts), kept=output is not None))


def _check(names: list[str], imatrix: Path | None) -> bool:
    """Return whether ``names`` are methods of GGUF.

    Raises:
        SettingsError: an unknown one, several where one is allowed, or one that needs what is not given.
    """
    from tunesmith.export.gguf.methods import ALIASES, gguf_methods, is_gguf_method
    from tunesmith.export.gguf.methods import METHODS as GGUF
    from tunesmith.export.methods import GGUF_LORA, METHODS, check_method

    is_gguf = any(map(is_gguf_method, names))
    if is_gguf:
        unknown = next((name for name in names if not is_gguf_method(name)), None)
        if unknown is not None:
            raise SettingsError(
                f"--method {unknown}: only methods of GGUF can be several: {', '.join((*GGUF, *ALIASES))}."
                f"{did_you_mean(unknown, (*GGUF, *ALIASES))}"
            )
        gguf_methods(names, dtype="float32", imatrix=imatrix is not None)
    elif imatrix is not None:
        raise SettingsError(f"--imatrix has no meaning for --method {','.join(names)}. Leave it out.")
    elif names != [GGUF_LORA]:
        name = ",".join(names)
        try:
            check_method(name)
        except SettingsError:
            near = "" if name == "gguf" else did_you_mean(name, (*METHODS, GGUF_LORA, *GGUF, *ALIASES))
            raise SettingsError(
                f"--method {name}: use {', '.join(METHODS)}; for GGUF a quantization (q8_0, q4_k_m, f16 ..., all in "
                f"docs/gguf.md), or {GGUF_LORA} for the adapter alone.{near}"
            ) from None
    return is_gguf


def _gguf_lines(report: GgufReport, rows: int, *, kept: bool) -> Iterator[str]:
    """Yield what a terminal shows of files in GGUF."""
    yield (
        f"written: {report.folder} ({report.seconds:.0f} s)"
        if kept
        else f"written for the upload: {report.seconds:.0f} s"
    )
    for file in report.files:
        stored, trial, found = file.stored.kinds, file.trial, file.trial.comparison
        yield f"{file.path.name} ({file.size / 2**20:,.0f} MiB)"
        yield f"  {', '.join(f'{count} {kind}' for kind, count in stored.items())}: read again, as in the run"
        if found is None:
            yield f"  {trial.reason}"
            continue
        yield f"  loaded by {found.runtime}; on {found.tokens} tokens ({rows} training rows):"
        yield f"  KL divergence {found.kl:.2g} nats (at most {found.largest_kl:.2g})"
        live = f"{found.live_perplexity:.4g}"
        yield f"  same likeliest token {found.top1:.1%}; perplexity {found.perplexity:.4g}, of the run {live}"
        gap = "" if found.text_gap is None else f", else near-ties of {found.text_gap:.2g} nats"
        yield f"  {found.equal_texts} of {found.texts} greedy texts are equal{gap}"
        if trial.texts:
            yield f"  {trial.texts} texts cut and {trial.chats} prompts made as by the tokenizer"
        for stop in trial.unknown_stops:
            yield f"  llama.cpp does not know that {stop} ends an answer: give it as a stop"
    yield from report.notes
    if report.url is not None:
        yield f"uploaded: {report.url}"


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
