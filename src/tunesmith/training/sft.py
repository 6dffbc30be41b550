"""Supervised fine-tuning: transformers' Trainer on packed documents, with the checks that make a run trustworthy.

Rows go in as they are (any schema of ``tunesmith.data``); masks, ledger and packing are made here. What is overridden,
and why:

* ``get_train_dataloader``, ``get_batch_samples``, ``compute_loss``: documents joined on one token axis, loss over the
  trained tokens of the **whole** optimizer step, all micro-batches and processes counted together;
* ``evaluate``: loss per token, not a mean of batch means.

Checks of gradients, resume and checkpoints are those of every trainer (``base.py``).

Gradients are summed by us, not by DDP's hooks: the loss calls the decoder and the head directly, and one flat
all-reduce of the adapter's gradients at the end of the step costs less than hooks in every backward.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tunesmith.adapters.inject import set_checkpointing
from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.core.files import make_folder
from tunesmith.core.tasks import CAUSAL_LM
from tunesmith.data.files import formatted_rows
from tunesmith.data.formats import text_goes_first
from tunesmith.data.parts import lanes_of, split_batch
from tunesmith.data.prepare import DocumentDataset, PackedDataset, PreparedData, prepare, split_documents
from tunesmith.engine.modes import evaluation_mode
from tunesmith.memory.plan import TrainingPlan, check_fits
from tunesmith.models.load import facts_of
from tunesmith.models.prompts import set_ends
from tunesmith.models.quantize import protect_gradients
from tunesmith.training.base import RunTrainer
from tunesmith.training.callbacks import InterruptWatch, default_callbacks
from tunesmith.training.config import SFTConfig
from tunesmith.training.fingerprint import settings_fingerprint
from tunesmith.training.graphs import graphs_of
from tunesmith.training.lanes import Lanes, lanes_there
from tunesmith.training.loader import DocumentBatches, DocumentLoader
from tunesmith.training.memory import apply_plan, memory_there_is, plan_run
from tunesmith.training.optimizer import optimizer_for
from tunesmith.training.plan import (
    apply_older_style,
    check_precision,
    check_purpose,
    choose_cadence,
    length_limit,
    one_tokenizer,
    only_pads,
    refuse_elsewhere,
    try_out,
)
from tunesmith.training.processes import gather_objects, sum_over_processes
from tunesmith.training.rows import begun_stream, refuse_foreign_ids, say_held_out, say_losses
from tunesmith.training.settings import FULL_RATE, LORA_RATE
from tunesmith.training.vision import collator_for, encoder_for, head_for

__all__ = ["SFTTrainer"]

_log = logging.getLogger(__name__)


class SFTTrainer(RunTrainer):
    """Train an adapter (or every trainable weight) of a causal or vision-language model on rows.

    Args:
        model: from ``get_peft_model``, or any transformers or PEFT language model, with or without eyes.
        args: an :class:`SFTConfig`; None uses its defaults.
        train_dataset, eval_dataset: a ``datasets`` object, list of rows, path, hub id, or :class:`PreparedData`.
        processing_class: the tokenizer or processor (``tokenizer=`` is the older name).
        data_collator: None, or a :class:`~tunesmith.training.vision.VisionDataCollator` for rows with images.
        formatting_func: row -> text or list of texts, for rows of your own shape.
        mapping: column -> role or field, as in ``tunesmith train --map``.
        dataset_text_field, max_seq_length, packing: the older call style; the same as the fields of ``args``.
        dataset_num_proc: taken, and without use: rows are read by one process.
        peft_config, compute_metrics: None; anything else is refused with what to do instead.

    Attributes:
        ledger: what happened to every row; raises already on rows that would train nothing.
        plan: what the layers keep, the tokens computed together, and the predicted peak.
        graph_choice: which parts are computed from CUDA graphs.
        remask: what ``train_on_responses_only`` also does to rows that are given to ``evaluate`` later.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tokenizer: Any = None,
        data_collator: Any = None,
        formatting_func: Callable[[Mapping[str, Any]], Any] | None = None,
        mapping: Mapping[str, str] | None = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        packing: bool | None = None,
        dataset_num_proc: int | None = None,
        peft_config: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = SFTConfig() if args is None else args
        refuse_elsewhere(peft_config, compute_metrics, eval_dataset)
        if not isinstance(args, SFTConfig):
            raise SettingsError(f"args is a {type(args).__name__}; an SFTConfig of tunesmith is needed.")
        args = args.for_a_run()
        task = facts_of(model).task
        if task != CAUSAL_LM:
            raise ModelError(
                f"the model was loaded for {task}, and SFTTrainer trains models that write. Use TaskTrainer."
            )
        if args.gradient_checkpointing and facts_of(model).checkpointing is False:
            set_checkpointing(model, True)  # what use_gradient_checkpointing=True of get_peft_model does
        args.gradient_checkpointing = False  # transformers' own would not reach fused layers
        data_collator = None if only_pads(data_collator) else data_collator
        self._tokenizer = one_tokenizer(processing_class, tokenizer, data_collator)
        apply_older_style(args, dataset_text_field, max_seq_length, packing)
        check_precision(args, model)
        protect_gradients(model)
        check_purpose(model)
        if not hasattr(model, "peft_config") and type(args.learning_rate) is type(LORA_RATE):
            args.learning_rate = FULL_RATE
        set_ends(model, self._tokenizer)
        self._encoder = encoder_for(model, self._tokenizer, args, data_collator)
        self._join = collator_for(model, self._tokenizer, data_collator)
        args.max_length = length_limit(args.max_length, facts_of(model).window)
        if args.dataset_text_field and mapping:
            raise SettingsError("dataset_text_field and mapping both say what the columns hold. Give one of them.")
        if formatting_func is not None and mapping:
            raise SettingsError("formatting_func makes the text of a row, mapping names its columns. Give one of them.")
        columns = {args.dataset_text_field: "text"} if args.dataset_text_field else mapping
        # What a function makes is text, whatever the field of the rows is called.
        self._mapping = columns if formatting_func is None else None
        self._formatting_func = formatting_func
        self.remask: Callable[[PreparedData], PreparedData] | None = None
        if train_dataset is None:
            raise SettingsError("train_dataset is missing: give rows, a path or a datasets object.")
        train_data, eval_data = self._prepare_sides(train_dataset, eval_dataset, args)
        refuse_foreign_ids(model, train_data, eval_data)
        self.train_data, self.eval_data, self.ledger = train_data, eval_data, train_data.ledger
        train_set = self._as_dataset(train_data, args, ledger=True)
        has_eval = eval_data is not None and args.evaluates
        try_out(args, model, choose_cadence(args, len(train_set), has_eval=has_eval))
        if args.should_save:
            make_folder(Path(args.output_dir))  # The Trainer makes it too, and explains nothing when it cannot.
        self._interrupts = InterruptWatch()
        # Old checkpoints are ours to remove: the Trainer's own sweep at the end would take the newest one too.
        self._keep, args.save_total_limit = args.save_total_limit, None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_set,  # type: ignore[arg-type]
            eval_dataset=None if eval_data is None else DocumentDataset(eval_data.documents),  # type: ignore[arg-type]
            processing_class=self._tokenizer,
            callbacks=[*default_callbacks(args), self._interrupts, *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=None if optimizers[0] is not None else optimizer_for(model, args),
        )
        # Our loss is already divided by the tokens of the whole step; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        # The Trainer's NEFTune scales by the length of the input, which here is the joined axis of many documents.
        self.neftune_noise_alpha = None
        self.head = head_for(_base(model), args)
        self.head.probe()
        self._tokens_since_log, self._log_time = 0, time.perf_counter()
        # A kernel per new shape costs a CPU in 16 bits more than some idle tokens.
        self.axis_multiple = 1 if facts_of(model).dtype.dtype.itemsize > 2 else 64
        self.lanes = lanes_there(model, args)
        self._lanes = Lanes(self.lanes)
        self._make_plan()

    # ---- data ----

    def _prepare_sides(
        self, train_rows: Any, eval_rows: Any, args: SFTConfig
    ) -> tuple[PreparedData, PreparedData | None]:
        """Return training and evaluation rows, with a share of the former set apart where there are no latter."""
        train_data = self._prepare(*begun_stream(train_rows, args), args=args)
        if eval_rows is not None or not args.eval_split:
            return train_data, None if eval_rows is None else self._prepare(eval_rows, args=args)
        side, held_out = split_documents(train_data, fraction=args.eval_split, seed=args.seed)
        if held_out is None:
            return train_data, None
        held_out.ledger.check()
        if not isinstance(train_rows, PreparedData):
            say_held_out(len(held_out.rows), len(train_data.rows), args)
        # The ledger of the whole source goes on: only it knows what was dropped before the split.
        return PreparedData(side.rows, train_data.ledger), held_out

    def _prepare(self, rows: Any, most_tokens: int | None = None, *, args: SFTConfig) -> PreparedData:
        if isinstance(rows, PreparedData):
            rows.ledger.check()
            return rows
        mapping = self._mapping
        if self._formatting_func is not None:
            rows = formatted_rows(rows, self._formatting_func)
        elif mapping is None and text_goes_first(rows):
            mapping = {"text": "text"}
            _log.warning(
                "the rows have a column text, which is trained on as it is (dataset_text_field='text'); to train on "
                "their other columns as a chat, remove it"
            )
        how: dict[str, Any] = {"max_length": args.max_length, "on_too_long": args.on_too_long, "mapping": mapping}
        data = prepare(rows, self._encoder, most_tokens=most_tokens, **how)
        data.ledger.check()
        say_losses(data.ledger, args)
        return data

    def _as_dataset(self, data: PreparedData, args: SFTConfig, *, ledger: bool) -> DocumentDataset | PackedDataset:
        if not args.packing:
            return DocumentDataset(data.documents)
        return PackedDataset(data.documents, args.max_length or 0, ledger=self.ledger if ledger else None)

    def replace_train_data(self, data: PreparedData) -> None:
        """Train on ``data`` from now on (``train_on_responses_only`` changes masks this way)."""
        data.ledger.check()
        self.train_data, self.ledger = data, data.ledger
        self.train_dataset = self._as_dataset(data, self.args, ledger=True)
        self._make_plan()

    def replace_eval_data(self, data: PreparedData) -> None:
        """Evaluate on ``data`` from now on."""
        data.ledger.check()
        self.eval_data, self.eval_dataset = data, DocumentDataset(data.documents)
        self._make_plan()

    def get_train_dataloader(self) -> DocumentLoader:
        """Return the loader of this process's micro-batches."""
        return self._loader(self.train_dataset, self.args.per_device_train_batch_size, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DocumentLoader:
        """Return the loader of this process's evaluation batches."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(dataset, self.args.per_device_eval_batch_size, shuffle=False)

    def _loader(self, dataset: Any, batch_size: int, *, shuffle: bool) -> DocumentLoader:
        batches = DocumentBatches(
            len(dataset),
            batch_size,
            shuffle=shuffle,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            rank=self.args.process_index,
            processes=self.args.world_size,
        )
        return DocumentLoader(dataset, batches, self._join, pin_memory=self.args.device.type == "cuda")

    def _make_plan(self) -> None:
        """Choose what layers keep and how many tokens are computed together, alike on all processes."""
        self.plan: TrainingPlan = gather_objects(plan_run(self), self.args.world_size)[0]
        check_fits(self.plan, memory_there_is(self.args.device))
        self.follow(self.plan)

    def follow(self, plan: TrainingPlan) -> None:
        """Train by ``plan`` from now on."""
        self.plan, self.part_tokens = plan, plan.part_tokens
        apply_plan(self.model, plan)
        self.graph_choice, self.graphs = graphs_of(self)

    # ---- one step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Return the micro-batches of one optimizer step and its number of trained tokens over all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self._tokens_since_log += sum(batch["tokens"] for batch in batches)
        trained = float(sum(len(batch["rows"]) for batch in batches))
        # Ctrl-C reaches processes at different moments: they agree here, or one would wait for another for ever.
        counts = torch.tensor([trained, float(self._interrupts.interrupted)], dtype=torch.float32, device=device)
        total, interrupted = sum_over_processes(counts, self.args.world_size)
        self._interrupts.agree(bool(interrupted))
        return batches, total.clamp(min=1)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the summed loss of a micro-batch over ``num_items_in_batch`` (its own trained tokens if None)."""
        divisor = max(len(inputs["rows"]), 1) if num_items_in_batch is None else num_items_in_batch
        loss = self.head.loss(inputs, divisor)
        return (loss, {}) if return_outputs else loss

    def backward_of(self, model: Any, inputs: dict[str, Any], divisor: Any) -> torch.Tensor:
        """Return the summed loss of a micro-batch over ``divisor``, after its backward, part by part."""
        loss = sum(self._part_step(model, part, divisor) for part in self._parts_of(inputs))
        assert isinstance(loss, torch.Tensor)
        return loss

    def _part_step(self, model: Any, part: dict[str, Any], divisor: Any) -> torch.Tensor:
        """Return the loss of a part after its backward; from a graph or in lanes where plan and part allow it."""
        # Whoever has written a loss of his own does not expect to be called by two threads, or recorded.
        if divisor is None or type(self).compute_loss is not SFTTrainer.compute_loss:
            return super().backward_of(model, part, divisor)
        if self.graphs is not None:
            self._enter_training(model)
            loss = self.graphs.step(part, divisor)
            if loss is not None:
                return loss
        width = self.head.model.get_input_embeddings().weight.shape[1]  # one with an adapter has no embedding_dim
        lanes = [part]
        if self.plan.lanes > 1:
            lanes = lanes_of(part, self.plan.lanes, width=width, multiple=self.axis_multiple)
        if len(lanes) < 2:
            return super().backward_of(model, part, divisor)
        self._enter_training(model)
        return self._lanes.step(lambda lane: self.head.loss(lane, divisor), lanes, [p for _, p in self.trainable()])

    def _enter_training(self, model: Any) -> None:
        """Do what the Trainer does before a forward: model, and optimizers that know two modes, into training mode."""
        if not (model.training and self.head.model.training):
            model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()

    def _parts_of(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Return smaller batches with the same sums, which keep less (data/parts.py)."""
        return split_batch(batch, self.part_tokens, multiple=self.axis_multiple) if self.part_tokens else [batch]

    # ---- logging and evaluation ----

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log loss per trained token and perplexity over the evaluation rows."""
        began = time.perf_counter()
        if eval_dataset is not None and not isinstance(eval_dataset, (DocumentDataset, PackedDataset)):
            prepared = self._prepare(eval_dataset, args=self.args)
            eval_dataset = DocumentDataset((self.remask(prepared) if self.remask else prepared).documents)
        if eval_dataset is None and self.eval_dataset is None:
            raise SettingsError("there are no evaluation rows: give eval_dataset, or an eval_split above 0.")
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.forget_buffers()
        with evaluation_mode(self.model):
            for batch in self.get_eval_dataloader(eval_dataset):
                for part in self._parts_of(batch):
                    sums[0] += self.head.loss(self._prepare_inputs(part), 1.0).double()
                    sums[1] += len(part["rows"])
        total, count = sum_over_processes(sums, self.args.world_size).tolist()
        if count == 0:
            raise SettingsError("the evaluation rows train on nothing, so they have no loss. Give other rows.")
        loss = total / count
        if not math.isfinite(loss) and self.is_in_train:
            self.stop("the eval loss", [])
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{metric_key_prefix}_tokens": count,
            f"{metric_key_prefix}_runtime": time.perf_counter() - began,
        }
        self.report_evaluation(metrics, began)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: what Trainer returns here are the logits of every token, which are never made."""
        raise SettingsError(
            "trainer.predict returns logits of every token, which are never made here. trainer.evaluate(rows) gives "
            "the loss, tunesmith.evaluation.evaluate(model, tokenizer, rows, 'exact_match') answers and their score."
        )

    # ---- checkpoints ----

    def run_fingerprint(self) -> dict[str, Any]:
        """Return data, model and settings of this run as comparable values."""
        data = {"train": self.train_data.fingerprint()}
        if self.eval_data is not None:
            data["eval"] = self.eval_data.fingerprint()
        settings = settings_fingerprint(self.args, self.args.world_size)
        return {"data": data, "model": self._model_fingerprint, "settings": settings}

    def run_record(self) -> dict[str, Any]:
        """Return the fingerprint and the plan, which a continued run follows."""
        return {**super().run_record(), "plan": self.plan.record()}

    def continue_from(self, record: dict[str, Any]) -> None:
        """Follow the plan of that run too: with another choice the sums would be rounded in another way."""
        super().continue_from(record)
        self.follow(self.plan.restored(record["plan"]))

    def reaches(self, name: str) -> bool:
        """Return whether the head has sent batches through the parameter ``name``."""
        return self.head.reaches(name)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """See :meth:`RunTrainer.train`."""
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self._lanes.close()
            if self.graphs is not None:
                self.graphs.close()


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
