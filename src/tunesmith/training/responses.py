"""``train_on_responses_only``: the name that Unsloth scripts use to mask everything but the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tunesmith.data.ledger import KeptRow, Ledger
from tunesmith.data.markers import Markers, resolve_markers, response_mask
from tunesmith.data.prepare import PreparedData
from tunesmith.data.types import Document, RowRefusedError

if TYPE_CHECKING:
    from tunesmith.training.sft import SFTTrainer

__all__ = ["train_on_responses_only"]


def train_on_responses_only(
    trainer: SFTTrainer, instruction_part: str | None = None, response_part: str | None = None
) -> SFTTrainer:
    """Train ``trainer``'s rows on the answers only, found by the markers that open an instruction and a response.

    Both parts None derives them from the tokenizer's chat template. Rows without a response marker are dropped and
    counted; when that leaves nothing, the ledger raises. Rows that came as conversations already train on answers
    only; for them the result is the same.

    Raises:
        DataError: no row trains on anything.
        SettingsError: one part is given and the other is not.
    """
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    markers = resolve_markers(tokenizer, instruction_part, response_part)
    trainer.replace_train_data(_masked(trainer.train_data, tokenizer, markers))
    if trainer.eval_data is not None:
        trainer.replace_eval_data(_masked(trainer.eval_data, tokenizer, markers))
    return trainer


def _masked(data: PreparedData, tokenizer: Any, markers: Markers) -> PreparedData:
    ledger = Ledger(
        rows_in=data.ledger.rows_in, dropped=data.ledger.dropped.copy(), examples=dict(data.ledger.examples)
    )
    kept: list[KeptRow] = []
    for row in data.rows:
        try:
            documents = tuple(_with_mask(document, tokenizer, markers) for document in row.documents)
        except RowRefusedError as refusal:
            ledger.drop(row.where, refusal.reason, str(refusal))
            continue
        masked = replace(row, documents=documents)
        ledger.keep(masked)
        kept.append(masked)
    return PreparedData(kept, ledger)


def _with_mask(document: Document, tokenizer: Any, markers: Markers) -> Document:
    # What is not trained already stays so: flags on messages, older turns of rows that were split by turn.
    trained = response_mask(document.input_ids, tokenizer, markers) & document.trained
    if not trained.any():
        raise RowRefusedError("nothing to train on", "no token of this row is to be trained.")
    return replace(document, trained=trained)
