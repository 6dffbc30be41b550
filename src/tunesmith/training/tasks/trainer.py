"""Training for a task on padded batches, with the checks and the checkpoints of every trainer (``training/base.py``).

What is overridden, and why: the loss is the sum over all labels of an optimizer step over their number, however the
step is split; non-finite values stop the run before they reach the weights; the first step proves that every lora_B
learns; evaluation gives the figures of the task; checkpoints are whole or not there, and fit only their own run.

One process trains. Layers are transformers' own.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tunesmith.core.errors import NotSupportedYetError, SettingsError
from tunesmith.core.files import make_folder
from tunesmith.data.task_rows import read_records, refuse_other_numbers
from tunesmith.data.tasks import TaskData, TaskRow, prepare_records, split_task_rows
from tunesmith.engine.modes import evaluation_mode
from tunesmith.models.heads import give_padding
from tunesmith.models.load import facts_of
from tunesmith.training.base import RunTrainer
from tunesmith.training.callbacks import InterruptWatch, default_callbacks
from tunesmith.training.config import SFTConfig
from tunesmith.training.fingerprint import settings_fingerprint
from tunesmith.training.optimizer import optimizer_for
from tunesmith.training.plan import (
    check_precision,
    check_purpose,
    choose_cadence,
    length_limit,
    one_tokenizer,
    try_out,
)
from tunesmith.training.rows import begun_stream, say_held_out, say_losses
from tunesmith.training.settings import FULL_RATE, LORA_RATE
from tunesmith.training.tasks.recipes import Recipe, recipe_for

__all__ = ["TaskTrainer", "score_rows"]

_log = logging.getLogger(__name__)


class TaskTrainer(RunTrainer):
    """Train a model that was loaded with a ``task_type`` on rows of that task.

    Args:
        model: from ``FastLanguageModel.get_peft_model``, or one with ``full_finetuning``.
        args: an :class:`SFTConfig`; None uses its defaults.
        train_dataset, eval_dataset: a ``datasets`` object, list of rows, path, hub id, or :class:`TaskData`. Which
            columns a task has is in ``tunesmith.data.task_rows``.
        processing_class: the tokenizer (``tokenizer=`` is the older name).
        mapping: column -> what it holds, ``{"headline": "text"}``.

    Attributes:
        ledger: what happened to every row.
        recipe: batch, loss and score of the task.
        plan: None: memory is planned for causal language models only.
    """

    plan = None
    _has_labels = False

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tokenizer: Any = None,
        mapping: Mapping[str, str] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = SFTConfig() if args is None else args
        if not isinstance(args, SFTConfig):
            raise SettingsError(f"args is a {type(args).__name__}; an SFTConfig of tunesmith is needed.")
        args = args.for_a_run()
        self._tokenizer = one_tokenizer(processing_class, tokenizer)
        give_padding(model, self._tokenizer)
        self.recipe = recipe_for(model, self._tokenizer)
        _refuse_elsewhere(args, facts_of(model).task, self.recipe)
        check_precision(args, model)
        check_purpose(model)
        if not hasattr(model, "peft_config") and type(args.learning_rate) is type(LORA_RATE):
            args.learning_rate = FULL_RATE
        args.max_length = length_limit(args.max_length, facts_of(model).window)
        if train_dataset is None:
            raise SettingsError("train_dataset is missing: give rows, a path or a datasets object.")
        self._mapping, self._task = mapping, facts_of(model).task
        train_data = self._prepare(begun_stream(train_dataset, args)[0], args)
        train_data.ledger.check()
        eval_data = None if eval_dataset is None else self._prepare(eval_dataset, args)
        if eval_data is None and args.eval_split:
            whole = len(train_data)
            train_data, eval_data = split_task_rows(train_data, fraction=args.eval_split, seed=args.seed)
            if eval_data is not None and not isinstance(train_dataset, TaskData):
                say_held_out(len(eval_data), whole, args)
        if eval_data is not None:
            eval_data.ledger.check()
        self.train_data, self.eval_data, self.ledger = train_data, eval_data, train_data.ledger
        has_eval = eval_data is not None and args.evaluates
        self.recipe.check(train_data.rows, args.per_device_train_batch_size)
        if has_eval:
            self.recipe.check(eval_data.rows, args.per_device_eval_batch_size)
        count = len(train_data) - self._leave_out_alone(args)
        try_out(args, model, choose_cadence(args, count, has_eval=has_eval))
        make_folder(Path(args.output_dir))
        self._interrupts = InterruptWatch()
        # Old checkpoints are ours to remove: the Trainer's own sweep at the end would take the newest one too.
        self._keep, args.save_total_limit = args.save_total_limit, None
        self._smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0
        super().__init__(
            model=model,
            args=args,
            data_collator=self.recipe.collate,
            train_dataset=train_data,  # type: ignore[arg-type]
            eval_dataset=eval_data,  # type: ignore[arg-type]
            processing_class=self._tokenizer,
            callbacks=[*default_callbacks(args), self._interrupts, *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=None if optimizers[0] is not None else optimizer_for(model, args),
        )
        # Our loss is already divided by the labels of the whole step; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self._tokens_since_log, self._log_time = 0, time.perf_counter()

    def _prepare(self, rows: Any, args: SFTConfig) -> TaskData:
        if isinstance(rows, TaskData):
            return rows
        refuse_other_numbers(rows, self.recipe.labels)
        records = read_records(rows, self._task, mapping=self._mapping)
        common: dict[str, Any] = {"max_length": args.max_length, "on_too_long": args.on_too_long}
        data = prepare_records(records, self._task, self._tokenizer, labels=self.recipe.labels, **common)
        say_losses(data.ledger, args)
        return data

    def _leave_out_alone(self, args: SFTConfig) -> bool:
        """Leave out, and say, a last batch of one row where such a row teaches nothing; return whether there is one."""
        rows, size = self.train_data.rows, args.per_device_train_batch_size
        is_alone = len(rows) % size == 1 < size and self.recipe.needs_others(rows)
        if is_alone:
            args.dataloader_drop_last = True
            _log.warning(
                "%s rows in batches of %d leave one row of each epoch alone, with nothing to be told apart from: it is "
                "left out", f"{len(rows):,}", size,
            )  # fmt: skip
        return is_alone

    # ---- one step ----

    def reaches(self, name: str) -> bool:
        """Return whether some batch so far had a label: without any there is no gradient."""
        return self._has_labels

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """Return the micro-batches of one optimizer step and the number of labels in them."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self._tokens_since_log += sum(int(batch["attention_mask"].sum()) for batch in batches)
        items = sum(self.recipe.items(batch) for batch in batches)
        self._has_labels |= items > 0
        return batches, max(1, items)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the summed loss of a micro-batch over ``num_items_in_batch`` (its own labels if None)."""
        total, outputs = self.recipe.loss(model, inputs, self._smoothing)
        loss = total / (max(1, self.recipe.items(inputs)) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    # ---- logging and evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the loss and the figures of the task over the evaluation rows."""
        began = time.perf_counter()
        rows = self.eval_dataset if eval_dataset is None else self._prepare(eval_dataset, self.args)
        if rows is None:
            raise SettingsError("there are no evaluation rows: give eval_dataset, or an eval_split above 0.")
        batch_size = self.args.per_device_eval_batch_size
        figures, _ = score_rows(self.model, self.recipe, list(rows), batch_size=batch_size)  # type: ignore[arg-type]
        if not math.isfinite(figures["loss"]) and self.is_in_train:
            self.stop("the eval loss", [])
        figures["runtime"] = time.perf_counter() - began
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.report_evaluation(metrics, began)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: transformers' own would take logits from batches of its own, and knows no rows that are left out.

        Raises:
            SettingsError: with what to do instead.
        """
        raise SettingsError(
            "trainer.predict is not there for tasks. trainer.evaluate(rows) gives the figures; score_rows("
            "trainer.model, trainer.recipe, rows, batch_size=8) of tunesmith.training.tasks.trainer also an answer for "
            "each row of trainer.train_data or eval_data, as `tunesmith evaluate --output FILE` writes them."
        )

    # ---- checkpoints ----

    def run_fingerprint(self) -> dict[str, Any]:
        """Return data, model and settings of this run as comparable values."""
        data = {"train": self.train_data.fingerprint()}
        if self.eval_data is not None:
            data["eval"] = self.eval_data.fingerprint()
        settings = {**settings_fingerprint(self.args, 1), "label_smoothing_factor": self._smoothing}
        return {"data": data, "model": self._model_fingerprint, "settings": settings}


def score_rows(
    model: Any, recipe: Recipe, rows: Sequence[TaskRow], *, batch_size: int, progress: Any = None
) -> tuple[dict[str, float], list[Any]]:
    """Return ``loss``, a mean over labels, with the figures of the task over ``rows``, and an answer for each row.

    ``progress`` is called with (rows done, all rows).
    """
    total, items, predicted = 0.0, 0, []
    recipe.check(rows, batch_size)
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(rows), batch_size):
            made = recipe.collate(rows[start : start + batch_size])
            batch = {name: value.to(model.device) for name, value in made.items()}
            loss, outputs = recipe.loss(model, batch)
            total, items = total + float(loss), items + recipe.items(batch)
            predicted += recipe.predict(model, batch, outputs)
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows))
    answers = recipe.answers(rows, predicted)
    return {"loss": total / max(items, 1), **recipe.score(rows, answers)}, answers


def _refuse_elsewhere(args: SFTConfig, task: str, recipe: Recipe) -> None:
    """Refuse what has no effect on a task, or is not written yet."""
    idle = [name for name in ("packing", "train_on", "dataset_text_field") if getattr(args, name)]
    if args.label_smoothing_factor and not recipe.smooths:
        idle.append("label_smoothing_factor")
    if idle:
        raise SettingsError(f"{', '.join(idle)}: without effect on {task}. Leave it out.")
    if args.world_size > 1:
        raise NotSupportedYetError(f"{task} on {args.world_size} processes is not supported yet. Start one.")
