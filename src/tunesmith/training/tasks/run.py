"""The trainer of a run for a task: rows read, labels found in them, the model loaded for both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.core.tasks import TASKS
from tunesmith.data.files import has_valid
from tunesmith.data.task_rows import Record, collect_labels, read_records
from tunesmith.data.tasks import TaskData, prepare_records, split_task_rows
from tunesmith.models.heads import Head, labels_of
from tunesmith.models.load import facts_of
from tunesmith.training.checkpoint import require_disk_space
from tunesmith.training.config import config_of
from tunesmith.training.loading import load_for_run
from tunesmith.training.settings import RunSettings
from tunesmith.training.tasks.trainer import TaskTrainer

__all__ = ["make_task_trainer"]


def make_task_trainer(
    settings: RunSettings, folder: Path, *, callbacks: Sequence[Any] = ()
) -> tuple[TaskTrainer, RunSettings]:
    """Return the trainer of a run in ``folder``, and the settings, in which a loaded adapter stands as it is.

    A new head has the labels of the training rows; one that the model has already keeps its own.

    Raises:
        DataError: rows cannot be read or used, or every evaluation row is also a training row.
        ModelError: the model cannot be loaded for the task.
    """
    records = list(read_records(settings.data, settings.task, mapping=settings.map, limit=settings.limit))
    labels = collect_labels(records) if TASKS[settings.task].has_labels else None
    head = Head(settings.task, labels, seed=settings.random_state, gives_way=True)
    model, tokenizer, settings = load_for_run(settings, head)
    train_data, eval_data = _prepare(settings, records, tokenizer, model)
    require_disk_space(model, folder)
    trainer = TaskTrainer(
        model=model,
        args=config_of(settings, folder),
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    return trainer, settings


def _prepare(
    settings: RunSettings, records: Sequence[Record], tokenizer: Any, model: Any
) -> tuple[TaskData, TaskData | None]:
    """Return training and evaluation rows: ``eval_data``, the folder's own valid files, or a share of the rows."""

    def encoded(found: Any) -> TaskData:
        window = settings.max_length or facts_of(model).window
        return prepare_records(
            found,
            settings.task,
            tokenizer,
            labels=labels_of(model.config),
            max_length=window,
            on_too_long=settings.on_too_long,
        )

    train_data = encoded(records)
    train_data.ledger.check()
    source = settings.eval_data or (settings.data if settings.eval_split else None)
    has_own = source is not None and has_valid(source)
    if settings.eval_data is None and not has_own:
        return split_task_rows(train_data, fraction=settings.eval_split, seed=settings.seed)
    assert source is not None
    split = "valid" if has_own else "train"
    eval_data = encoded(read_records(source, settings.task, mapping=settings.map, split=split))
    eval_data.ledger.check()
    _refuse_the_same(train_data, eval_data)
    return train_data, eval_data


def _refuse_the_same(train_data: TaskData, eval_data: TaskData) -> None:
    known = {row.fingerprint() for row in train_data.rows}
    shared = sum(row.fingerprint() in known for row in eval_data.rows)
    if shared == len(eval_data):
        raise DataError("every evaluation row is also a training row: its figures would say nothing. Give other rows.")
    if shared:
        train_data.ledger.notes["evaluation row that is also a training row"] += shared
