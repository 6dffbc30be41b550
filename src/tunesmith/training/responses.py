"""``train_on_responses_only``: the name that Unsloth scripts use to mask everything but the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import SettingsError
from tunesmith.data.ledger import KeptRow, Ledger, summary
from tunesmith.data.markers import Markers, resolve_markers, response_mask
from tunesmith.data.prepare import PreparedData
from tunesmith.data.types import Document, RowRefusedError
from tunesmith.training.rows import say_losses

if TYPE_CHECKING:
    from tunesmith.training.sft import SFTTrainer

__all__ = ["train_on_responses_only"]


def train_on_responses_only(
    trainer: SFTTrainer,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> SFTTrainer:
    """Train ``trainer``'s rows on the answers only, found by the markers that open an instruction and a response.

    Both parts None derives them from the tokenizer's chat template. Rows without a response marker are dropped and
    counted; when that leaves nothing, the ledger raises. Rows that came as conversations already train on answers
    only; for them the result is the same. ``last_response_only`` trains the last answer of a row alone. ``tokenizer``,
    or a processor, is asked for the template in place of the trainer's. ``force_match`` and ``num_proc`` are taken, and
    without use: a marker is always matched whole, and one process does it.

    Raises:
        DataError: no row trains on anything.
        SettingsError: one part is given and the other is not, the trainer is another library's, a function is to be
            returned, or ``tokenizer`` has other tokens than the trainer's.
    """
    if not hasattr(trainer, "train_data"):
        raise SettingsError(f"a {type(trainer).__module__}.SFTTrainer was given: this masks rows of tunesmith's own.")
    if return_function:
        raise SettingsError("return_function=True: the trainer's own rows are masked, by no function. Leave it out.")
    own = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    asked = own if tokenizer is None else getattr(tokenizer, "tokenizer", tokenizer)
    if asked is not own and asked.get_vocab() != own.get_vocab():
        raise SettingsError("tokenizer has other tokens than the trainer's, which made the rows. Leave it out.")
    markers = resolve_markers(asked, instruction_part, response_part)

    def remask(data: PreparedData) -> PreparedData:
        return _masked(data, own, markers, last_response_only)

    train = remask(trainer.train_data)
    held_out = None if trainer.eval_data is None else remask(trainer.eval_data)
    if held_out is not None and trainer.ledger.splits:
        _count_both_sides(train, held_out)
    if train.ledger.dropped != trainer.ledger.dropped:
        say_losses(train.ledger, trainer.args)
    trainer.replace_train_data(train)
    trainer.remask = remask
    if held_out is not None:
        trainer.replace_eval_data(held_out)
    return trainer


def _count_both_sides(train: PreparedData, held_out: PreparedData) -> None:
    """Complete the ledger of the whole source, which is that of the training side, with the rows set apart."""
    ledger = train.ledger
    ledger.splits = {name: summary(side.rows) for name, side in (("train", train), ("eval", held_out))}
    ledger.dropped += held_out.ledger.dropped
    for row in held_out.rows:
        ledger.keep(row)
    for reason, places in held_out.ledger.examples.items():
        ledger.examples.setdefault(reason, places)


def _masked(data: PreparedData, tokenizer: Any, markers: Markers, last_only: bool) -> PreparedData:
    before = data.ledger
    ledger = Ledger(
        rows_in=before.rows_in,
        dropped=before.dropped.copy(),
        documents_dropped=before.documents_dropped.copy(),
        examples={reason: list(places) for reason, places in before.examples.items()},
    )
    kept: list[KeptRow] = []
    for row in data.rows:
        try:
            # A row that was split by turn ends with the document of its last answer.
            given = row.documents[-1:] if last_only else row.documents
            documents = tuple(_with_mask(document, tokenizer, markers, last_only) for document in given)
        except RowRefusedError as refusal:
            ledger.drop(row.where, refusal.reason, str(refusal))
            continue
        masked = replace(row, documents=documents)
        ledger.keep(masked)
        kept.append(masked)
    return PreparedData(kept, ledger)


def _with_mask(document: Document, tokenizer: Any, markers: Markers, last_only: bool) -> Document:
    # What is not trained already stays so: flags on messages, older turns of rows that were split by turn.
    trained = response_mask(document.input_ids, tokenizer, markers, last_only=last_only) & document.trained
    if not trained.any():
        raise RowRefusedError("nothing to train on", "no token of this row is to be trained.")
    # Of the earlier answers the ends are not to be trained either.
    ends = document.end_of_turn[-1:] if last_only else document.end_of_turn
    return replace(document, trained=trained, end_of_turn=ends)
