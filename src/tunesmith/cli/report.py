"""What a run says before its first step and after its last one. Used by ``train`` and ``demo``."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tunesmith.adapters.inject import trainable_share
from tunesmith.cli.console import console, plain, print_lines
from tunesmith.cli.words import amount, bytes_in_words, duration
from tunesmith.core.device import describe_device
from tunesmith.core.tasks import TASKS
from tunesmith.models.load import facts_of

if TYPE_CHECKING:
    from tunesmith.data.ledger import Ledger
    from tunesmith.data.tasks import TaskLedger
    from tunesmith.memory.plan import TrainingPlan
    from tunesmith.training.run import RunResult
    from tunesmith.training.sft import SFTTrainer
    from tunesmith.training.tasks.trainer import TaskTrainer

__all__ = [
    "facts_table",
    "plan_in_short",
    "print_banner",
    "print_ledger",
    "print_result",
    "result_facts",
    "resume_command",
]


def print_ledger(ledger: Ledger | TaskLedger) -> None:
    """Print what happened to every row."""
    out = console()
    out.rule("data", align="left", style="dim")
    print_lines(ledger.lines(width=out.width))


def print_banner(trainer: SFTTrainer | TaskTrainer) -> None:
    """Print the data ledger, then everything that was decided for this run, each with its reason."""
    print_ledger(trainer.ledger)
    console().rule("run", align="left", style="dim")
    console().print(facts_table(_banner(trainer)))


def print_result(result: RunResult, next_commands: Iterable[str]) -> None:
    """Print the figures of a finished run, and what to do with it."""
    console().rule("result", align="left", style="dim")
    console().print(facts_table(result_facts(result)))
    console().print("next:")
    print_lines(f"  {command}" for command in next_commands)


def result_facts(result: RunResult) -> list[tuple[str, str]]:
    """Return the figures of a finished run as names and values."""
    numbers = result.numbers
    rows = [("steps", f"{numbers['steps']:,} in {duration(numbers['seconds'])}")]
    if numbers["first_loss"] is not None:
        rows.append(("training loss", f"{numbers['first_loss']:.4f} at first, {numbers['last_loss']:.4f} at the end"))
    if numbers["best_eval_loss"] is not None:
        kept = f", step {numbers['best_step']:,}, is kept" if numbers["best_step"] else ""
        rows.append(("eval loss", f"{numbers['best_eval_loss']:.4f} at best{kept}"))
    rows += [(name.removeprefix("eval_"), f"{numbers[name]:.4f}") for name in numbers if name.startswith("eval_")]
    if numbers["tokens_per_s"]:
        rows.append(("speed", f"{amount(numbers['tokens_per_s'])} tokens/s"))
    return [*rows, ("peak memory", _peaks(numbers)), ("folder", str(result.folder))]


def _peaks(numbers: dict[str, Any]) -> str:
    measured, predicted = numbers["peak_bytes"], numbers["predicted_peak_bytes"]
    if predicted is None:
        return bytes_in_words(measured)
    if numbers.get("peak_while_loading"):
        steps = bytes_in_words(numbers["predicted_step_bytes"])
        return f"{bytes_in_words(measured)}, reached while loading; the steps were predicted to need {steps}"
    difference = 100 * (predicted / measured - 1)
    return f"{bytes_in_words(measured)}; {bytes_in_words(predicted)} were predicted ({difference:+.0f} %)"


def resume_command(folder: Path) -> str:
    """Return the command that continues the run in ``folder``."""
    return f"tunesmith train {shlex.quote(str(folder / 'settings.yaml'))} --resume"


def facts_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Return names beside values, the values wrapped under each other."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(plain(value)))
    return table


_WIDTHS = {
    None: "",
    "4bit": "; the decoder's linear layers in 4 bits (NF4, double quantization)",
    "8bit": "; the decoder's linear layers in 8 bits",
    "fp8": "; the decoder's linear layers in float8 (e4m3, a scale a row)",
    "fp8-block": "; the decoder's linear layers in float8 (e4m3, a scale a block)",
}


def _banner(trainer: SFTTrainer | TaskTrainer) -> list[tuple[str, str]]:
    args, facts = trainer.args, facts_of(trainer.model)
    trainable, total = trainable_share(trainer.model)
    steps = _steps(trainer)
    rows = [
        ("model", facts.name),
        *_task_rows(trainer),
        ("device", _devices(trainer)),
        ("dtype", f"{facts.dtype.name} ({facts.dtype.reason}){_WIDTHS[facts.width]}"),
        ("trainable", f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)"),
        *_adapters(trainer.model),
        ("rows", _row_counts(trainer)),
        ("batch", _batch(args)),
        *_language_rows(trainer, steps),
        ("steps", f"{steps:,} an epoch, {_total_steps(args, steps):,} in all"),
        ("folder", str(args.output_dir)),
    ]
    reasons = [] if trainer.plan is None else trainer.head.reasons
    return [*rows, *(("note", note) for note in [*reasons, *facts.notes])]


def _task_rows(trainer: SFTTrainer | TaskTrainer) -> list[tuple[str, str]]:
    facts = facts_of(trainer.model)
    if trainer.plan is not None:
        return []
    labels = trainer.recipe.labels if TASKS[facts.task].has_labels else ()
    names = f": {', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}" if labels else ""
    new = f"; new, from chance: {', '.join(facts.new_modules)}" if facts.new_modules else ""
    return [("task", f"{facts.task}{names}{new}")]


def _language_rows(trainer: SFTTrainer | TaskTrainer, steps: int) -> list[tuple[str, str]]:
    if trainer.plan is None:
        return []
    on_gpu = trainer.args.device.type == "cuda"
    return [
        ("trained on", _trained_tokens(trainer)),
        ("per step", _per_step(trainer, steps)),
        ("memory", plan_in_short(trainer.plan)),
        *([("CUDA graphs", str(trainer.graph_choice))] if on_gpu else []),
    ]


def plan_in_short(plan: TrainingPlan) -> str:
    """Return the predicted peak, what layers compute again and the tokens computed together, in one sentence."""
    if not plan.peak:
        return f"{plan.reason}; checkpointing: {plan.describe()}"
    warning = "" if plan.advice is None else f". It may not fit: {plan.advice}"
    peak = f"{bytes_in_words(plan.peak)} predicted at the peak"
    return f"{peak}; checkpointing: {plan.describe()} ({plan.reason}); together: {plan.together()}{warning}"


def _devices(trainer: SFTTrainer | TaskTrainer) -> str:
    described = describe_device(trainer.args.device)
    return described if trainer.args.world_size == 1 else f"{trainer.args.world_size} x {described}"


def _adapters(model: Any) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for config in getattr(model, "peft_config", {}).values():
        targets = config.target_modules
        named = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        named = ", ".join(filter(None, [named, *sorted(config.target_parameters or ())]))
        variants = [name for name, on in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if on]
        extra = f", dropout {config.lora_dropout:g}" if config.lora_dropout else ""
        name = " + ".join(["LoRA", *variants])
        rows.append(("adapter", f"{name}, r {config.r}, alpha {config.lora_alpha:g}{extra}, on {named}"))
    return rows


def _row_counts(trainer: SFTTrainer | TaskTrainer) -> str:
    evaluated = "none for evaluation"
    if trainer.eval_data is not None:
        every = trainer.args.eval_steps
        steps = "step" if every == 1 else f"{every:,} steps"
        evaluated = f"{len(trainer.eval_data.rows):,} for evaluation every {steps}"
    return f"{len(trainer.train_data.rows):,} to train on, {evaluated}"


def _trained_tokens(trainer: SFTTrainer) -> str:
    words = {"assistant": "answers only", "last": "the last answer only", "all": "all tokens"}
    ledger = trainer.ledger
    # Nothing comes before the first token of a document, so it is never trained.
    is_everything = ledger.trained_tokens == ledger.tokens - ledger.documents
    asked = trainer.args.train_on or ("all" if is_everything else "assistant")
    return f"{words[asked]}: {100 * ledger.trained_share:.0f} % of the tokens"


def _batch(args: Any) -> str:
    size, accumulation, devices = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    unit = "bins" if args.packing else "documents"
    parts = f"{size} x {accumulation} accumulation x {devices} {'device' if devices == 1 else 'devices'}"
    return f"{size * accumulation * devices} {unit} = {parts}"


def _steps(trainer: SFTTrainer | TaskTrainer) -> int:
    """Return the optimizer steps of an epoch, counted as transformers' Trainer does."""
    return max(1, math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps))


def _total_steps(args: Any, steps: int) -> int:
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)


def _per_step(trainer: SFTTrainer, steps: int) -> str:
    documents = trainer.train_data.documents
    tokens = sum(map(len, documents)) / steps
    return f"{amount(len(documents) / steps)} documents, {amount(tokens)} tokens on average"
