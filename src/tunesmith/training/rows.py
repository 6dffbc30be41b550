"""What trainers do about rows that users hand them in Python: how far streams are read, what is refused and said."""

from __future__ import annotations

import logging
import math
from typing import Any

from tunesmith.core.errors import ModelError
from tunesmith.data.ledger import Ledger, losses
from tunesmith.data.prepare import PreparedData
from tunesmith.data.tasks import TaskLedger
from tunesmith.training.config import SFTConfig

__all__ = ["begun_stream", "refuse_foreign_ids", "say_held_out", "say_losses"]

_log = logging.getLogger(__name__)


def say_losses(ledger: Ledger | TaskLedger, args: SFTConfig) -> None:
    """Say once what is left out or cut of rows that a trainer read by itself; commands print the whole ledger."""
    said = losses(ledger)
    if said is not None and args.process_index == 0:
        _log.warning("%s", said)


def say_held_out(held_out: int, count: int, args: SFTConfig) -> None:
    """Say how many of ``count`` rows are not trained on, though nobody asked for that."""
    if args.process_index == 0:
        _log.warning("%d of %d rows are held out to evaluate on; eval_split=0 trains on all", held_out, count)


def begun_stream(rows: Any, args: SFTConfig) -> tuple[Any, int | None]:
    """Return of a streamed ``datasets`` object as many rows as ``max_steps`` uses, which is said; others as they are.

    How many rows fill the bins of ``packing`` is not known before they are read: the second value are the tokens to
    read then. Rows are counted, split and planned before the first step: a stream without an end would never get there.
    """
    if type(rows).__name__ == "IterableDatasetDict" and "train" in rows:
        rows = rows["train"]
    if type(rows).__name__ != "IterableDataset":
        return rows, None
    if args.max_steps < 1:
        _log.warning("the streamed rows are read to their end before training begins; max_steps reads what it uses")
        return rows, None
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    count = math.ceil(args.max_steps * a_step / (1 - args.eval_split))
    if args.packing:
        tokens = count * (args.max_length or 0)
        _log.warning("streamed rows of %s tokens are read, as many as max_steps=%d uses", f"{tokens:,}", args.max_steps)
        return rows.take(tokens), tokens  # no row that is kept has fewer than one, and rows that are not end too
    _log.warning(
        "of the streamed rows the first %s are read, as many as max_steps=%d uses", f"{count:,}", args.max_steps
    )
    return rows.take(count), None


def refuse_foreign_ids(model: Any, *sides: PreparedData | None) -> None:
    """Refuse rows with token ids that the model has no embedding for.

    Raises:
        ModelError: naming the row.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    for side in sides:
        for document in () if side is None else side.documents:
            highest = int(document.input_ids.max())
            if highest >= rows:
                raise ModelError(
                    f"{document.where}: token {highest}, and the model has embeddings for {rows}. Where tokens were "
                    f"added to the tokenizer, load the model with resize_model_vocab={highest + 1} or more "
                    "(len(tokenizer))."
                )
