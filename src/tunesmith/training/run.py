"""One training run from settings to a folder: load, adapt, prepare, train, save.

Used by ``tunesmith train`` and ``tunesmith demo``. Prints nothing: the caller is told what happens through
``on_ready`` (once, before the first step) and sees steps through its own Trainer callbacks.

The folder of a run::

    settings.yaml        the resolved settings
    ledger.json          what happened to every row
    plan.json            bytes by part, the predicted peak, what layers keep
    metrics.jsonl        a JSON line per log
    training_loss.png    training and eval loss over steps
    checkpoint-N/        the newest two and the best, whole with checksums
    adapter/             the result: a plain PEFT folder with tokenizer and model card; model/ where all weights train
    torchao/             the quantized model, where the run trained for a qat_scheme that this machine can convert
    result.json          final numbers
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.adapters.inject import trainable_share
from tunesmith.core.errors import DataError, OutputError
from tunesmith.core.files import as_output_error, lock, require_writable, whole_folder, write_text
from tunesmith.core.memory import peak_bytes
from tunesmith.core.tasks import CAUSAL_LM, TASKS
from tunesmith.core.versions import stack_versions
from tunesmith.data.files import has_valid
from tunesmith.data.prepare import PreparedData, prepare, split_documents
from tunesmith.data.vision import encoder_of
from tunesmith.export.card import model_card
from tunesmith.export.torchao import save_torchao, why_not
from tunesmith.models.heads import Head, labels_of
from tunesmith.models.load import facts_of
from tunesmith.training.callbacks import loss_plot
from tunesmith.training.checkpoint import checkpoints_in, require_disk_space
from tunesmith.training.config import config_of, dated_folder
from tunesmith.training.loading import load_for_run
from tunesmith.training.processes import wait_for_processes
from tunesmith.training.settings import RunSettings
from tunesmith.training.sft import SFTTrainer
from tunesmith.training.tasks.run import make_task_trainer
from tunesmith.training.tasks.trainer import TaskTrainer

__all__ = ["RunResult", "choose_folder", "make_trainer", "prepare_data", "run_training"]

_log = logging.getLogger(__name__)

_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended.

    Attributes:
        folder: the run's folder.
        trained: the folder of the adapter or model, None when the run was interrupted.
        numbers: steps, losses, seconds, tokens/s, peak bytes; what ``result.json`` holds.
        trainer: for what follows in the same process (generation, evaluation).
        was_finished: the run had no step left to take when it was resumed, and its folder is as it was.
    """

    folder: Path
    trained: Path | None
    numbers: dict[str, Any]
    trainer: SFTTrainer | TaskTrainer
    was_finished: bool = False

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run before its last step."""
        return self.trained is None


def choose_folder(settings: RunSettings, *, resume: bool) -> Path:
    """Return the run's folder, and refuse one that holds something else.

    Raises:
        OutputError: the folder holds another run and ``resume`` is False, or holds files of another kind, or there
            is nothing to resume.
    """
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if settings.output_dir is None:
        if processes > 1:
            raise OutputError("several processes write one folder, and each would date its own: give output_dir.")
        if resume:
            raise OutputError(
                "--resume needs the folder of the run: give --output-dir runs/NAME, or tunesmith train "
                "runs/NAME/settings.yaml --resume."
            )
        model = Path(settings.model).name.replace(":", "-")
        return dated_folder(model)
    folder = Path(settings.output_dir).expanduser()
    if rank > 0:
        return folder  # The first process looks at the folder, and is about to write to it.
    with as_output_error(folder):
        if folder.is_file():
            raise OutputError(f"output_dir {folder} is a file. Give a folder.")
        require_writable(folder)
        entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    entries = [name for name in entries if name != _LOCK]
    if resume and not entries:
        raise OutputError(f"there is no run in {folder.absolute()} to resume. Give its output_dir.")
    if entries and "settings.yaml" not in entries:
        raise OutputError(f"output_dir {folder} holds other files ({', '.join(entries[:3])}). Give a new folder.")
    if entries and not resume:
        raise OutputError(
            f"output_dir {folder} already holds a run. Continue it with --resume, or give another output_dir."
        )
    return folder


def run_training(
    settings: RunSettings,
    *,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    on_ready: Callable[[SFTTrainer], None] | None = None,
) -> RunResult:
    """Run ``settings`` and return how it ended.

    Args:
        resume: continue from the newest whole checkpoint of ``output_dir``; bit-equal to a run without a break.
        callbacks: Trainer callbacks, for progress.
        on_ready: called with the trainer before the first step, for a banner.

    Raises:
        TunesmithError: anything that the user can mend; see the modules that this composes.
    """
    folder = choose_folder(settings, resume=resume)
    trainer, settings = make_trainer(settings, folder, callbacks=callbacks)
    with lock(folder / _LOCK, waits=False) if trainer.args.should_save else nullcontext():
        if settings.output_dir is not None:
            choose_folder(settings, resume=resume)  # another process may have been here since
        result = _run(trainer, settings, folder, resume, on_ready)
        (folder / _LOCK).unlink(missing_ok=True)
        return result


def _run(
    trainer: Any, settings: RunSettings, folder: Path, resume: bool, on_ready: Callable[[SFTTrainer], None] | None
) -> RunResult:
    """Train and save in a folder that this process holds."""
    # A run that continues has its plan, and one that is about to be refused must not overwrite it.
    if trainer.args.should_save and not (resume and checkpoints_in(folder)):
        _write_plan(folder, settings, trainer)
    if on_ready is not None:
        on_ready(trainer)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    trained = None if trainer.interrupted else folder / ("model" if settings.full_finetuning else "adapter")
    before = _finished(folder) if resume and trained is not None and trained.is_dir() else {}
    if before.get("steps") == trainer.state.global_step:
        # Written anew, the result would have the seconds and the peak of a run that did nothing.
        return RunResult(folder, trained, before, trainer, was_finished=True)
    numbers = _numbers(trainer, time.perf_counter() - began)
    if trainer.args.should_save:
        if trained is not None:
            _save(trained, settings, trainer, numbers)
            _quantize(trained.with_name("torchao"), trainer)
            write_text(folder / "result.json", json.dumps(numbers, indent=1) + "\n")
        with as_output_error(folder):
            loss_plot(trainer.state.log_history, folder / "training_loss.png")
    wait_for_processes(trainer.args)
    return RunResult(folder, trained, numbers, trainer)


def _finished(folder: Path) -> dict[str, Any]:
    """Return what ``result.json`` holds, which is written last; nothing where it is not there."""
    file = folder / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def make_trainer(
    settings: RunSettings, folder: Path, *, callbacks: Sequence[Any] = ()
) -> tuple[SFTTrainer | TaskTrainer, RunSettings]:
    """Return the trainer of a run in ``folder``, and the settings, in which a loaded adapter stands as it is."""
    if settings.task != CAUSAL_LM:
        return make_task_trainer(settings, folder, callbacks=callbacks)
    model, tokenizer, settings = load_for_run(settings, Head(CAUSAL_LM))
    train_data, eval_data = prepare_data(settings, tokenizer, facts_of(model).window)
    require_disk_space(model, folder)
    trainer = SFTTrainer(
        model=model,
        args=config_of(settings, folder),
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    return trainer, settings


def prepare_data(settings: RunSettings, tokenizer: Any, window: int) -> tuple[PreparedData, PreparedData | None]:
    """Return training and evaluation rows: ``eval_data``, the folder's own valid files, or a share of the rows.

    Raises:
        DataError: a source cannot be read, or training or evaluation rows train on nothing.
    """
    encoder = encoder_of(tokenizer, settings.train_on)
    common: dict[str, Any] = {
        "max_length": settings.max_length or window,
        "on_too_long": settings.on_too_long,
        "mapping": settings.map,
    }
    train_data = prepare(settings.data, encoder, limit=settings.limit, **common)
    train_data.ledger.check()
    if settings.eval_data is not None:
        eval_data = (
            prepare(settings.eval_data, encoder, split="valid", **common)
            if has_valid(settings.eval_data)
            else prepare(settings.eval_data, encoder, **common)
        )
    elif settings.eval_split and has_valid(settings.data):
        eval_data = prepare(settings.data, encoder, split="valid", **common)
    elif settings.eval_split:
        train_rows, eval_rows = split_documents(train_data, fraction=settings.eval_split, seed=settings.seed)
        # The ledger of the whole source goes on: only it knows what was dropped before the split.
        return PreparedData(train_rows.rows, train_data.ledger), eval_rows
    else:
        return train_data, None
    eval_data.ledger.check()
    shared = {row.fingerprint() for row in train_data.rows} & {row.fingerprint() for row in eval_data.rows}
    if shared and len(shared) == len({row.fingerprint() for row in eval_data.rows}):
        raise DataError(
            "every evaluation row is also a training row: the eval loss would say nothing. Give other rows."
        )
    if shared:
        train_data.ledger.notes["evaluation row that is also a training row"] += len(shared)
    return train_data, eval_data


def _write_plan(folder: Path, settings: RunSettings, trainer: SFTTrainer | TaskTrainer) -> None:
    import yaml

    resolved = {**settings.resolved(), "output_dir": str(folder)}
    write_text(folder / "settings.yaml", yaml.safe_dump(resolved, sort_keys=False))
    ledgers = {"train": trainer.ledger.as_dict()}
    if trainer.eval_data is not None:
        ledgers["eval"] = trainer.eval_data.ledger.as_dict()
    write_text(folder / "ledger.json", json.dumps(ledgers, indent=1) + "\n")
    if trainer.plan is not None:
        write_text(folder / "plan.json", json.dumps(trainer.plan.record(), indent=1) + "\n")


def _numbers(trainer: SFTTrainer | TaskTrainer, seconds: float) -> dict[str, Any]:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    speeds = [entry["tokens_per_s"] for entry in history if "tokens_per_s" in entry]
    trainable, total = trainable_share(trainer.model)
    return {
        **_best_figures(trainer),
        "steps": trainer.state.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "best_eval_loss": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step or None,
        "seconds": seconds,
        "tokens_per_s": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "peak_bytes": peak_bytes(),
        "predicted_peak_bytes": None if trainer.plan is None else trainer.plan.peak or None,
        "predicted_step_bytes": None if trainer.plan is None else sum(trainer.plan.parts.values()) or None,
        "peak_while_loading": _peaked_while_loading(trainer),
        "trainable_parameters": trainable,
        "parameters": total,
    }


def _peaked_while_loading(trainer: SFTTrainer | TaskTrainer) -> bool:
    """Return whether the peak was there before the first step: on a CPU the plan measures it and predicts the rest."""
    if trainer.plan is None or trainer.args.device.type != "cpu":
        return False
    return peak_bytes() <= trainer.plan.peak == trainer.plan.phases.get("load")


def _best_figures(trainer: SFTTrainer | TaskTrainer) -> dict[str, float]:
    """Return the figures of the evaluation of the step that is kept, where a task has some."""
    if not isinstance(trainer, TaskTrainer):
        return {}
    step = trainer.state.best_global_step or trainer.state.global_step
    kept = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step]
    figures: dict[str, float] = kept[-1] if kept else {}
    leave = ("eval_loss", "eval_runtime")
    return {name: value for name, value in figures.items() if name.startswith("eval_") and name not in leave}


def _save(trained: Path, settings: RunSettings, trainer: SFTTrainer | TaskTrainer, numbers: dict[str, Any]) -> None:
    with whole_folder(trained) as folder:
        trainer.model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        card = model_card(
            base=settings.model,
            is_adapter=not settings.full_finetuning,
            task=settings.task,
            labels=labels_of(trainer.model.config) if TASKS[settings.task].has_labels else (),
            settings=settings.resolved(),
            ledger=trainer.ledger.as_dict(),
            result=numbers,
            versions=stack_versions(),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def _quantize(folder: Path, trainer: SFTTrainer) -> None:
    """Write the quantized model of a run that trained for a scheme, or say why not here."""
    scheme = facts_of(trainer.model).qat
    reason = None if scheme is None else why_not(trainer.model, scheme)
    if reason is not None:
        _log.warning("%s", reason)
    elif scheme is not None:
        save_torchao(trainer.model, folder, trainer.processing_class)
