"""What the trainer uses for a vision-language model in place of its parts for text, and the collator of users' scripts.

``SFTTrainer`` asks here for three things: the encoder of its rows, the loss of its batches, and what joins documents.
Everything else - ledger, accumulation, checks, checkpoints, resume - is the same for both kinds of models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tunesmith.core.arguments import ANY, Idle, refuse_others
from tunesmith.core.errors import DataError, ModelError, NotSupportedYetError, SettingsError
from tunesmith.data.collate import IGNORED
from tunesmith.data.formats import to_example
from tunesmith.data.images import Resize, check_resize
from tunesmith.data.masks import ExampleEncoder
from tunesmith.data.prepare import DocumentDataset
from tunesmith.data.types import Document, RowRefusedError, SourceRow, TrainOn
from tunesmith.data.vision import ImageCollator, VisionEncoder, encoder_of
from tunesmith.engine.head import LossHead
from tunesmith.engine.vision import VisionHead
from tunesmith.models.load import facts_of
from tunesmith.models.vision import has_vision, towers
from tunesmith.training.config import SFTConfig
from tunesmith.training.loader import JOINED

__all__ = ["VisionDataCollator", "collator_for", "encoder_for", "head_for"]


_OTHERS: Idle = {
    "ignore_index": ((None, IGNORED), f"labels without loss are {IGNORED}, as everywhere in transformers"),
    "completion_only_loss": ((None, True), "train_on_responses_only=False trains every token"),
    "formatting_func": ((None,), "give it to SFTTrainer"),
    "force_match": (ANY, "markers are always matched whole"),
    "num_proc": (lambda count: count is None or isinstance(count, int), "one process does it"),
    "resize_dimension": ((None, 0), "resize is of the longest side"),
    "snap_to_patch_size": ((None, False), "the processor does it where the model needs it"),
}


class VisionDataCollator:
    """Turns rows of messages with images into batches; see ``data/images.py`` for how rows hold images.

    Given to ``SFTTrainer`` it says how rows are read, and rows that cannot be used are counted in the ledger. It is
    also a plain collator for ``transformers.Trainer``: it returns what the model takes, with ``labels``.

    Args:
        model: the vision-language model that trains.
        processor: the one that it was loaded with.
        max_seq_length: longest row in tokens; None takes the window that the model was loaded with.
        resize: the longest side in pixels that larger images are scaled down to, or an exact (width, height); None
            (Unsloth's "min") leaves them to the processor.
        train_on_responses_only: train the answers; False trains every token but those of images.
        instruction_part, response_part: texts that open a question and an answer in the rendering, both or none;
            without them answers are found by the chat template itself.
        last_response_only: train the last answer alone.
        pad_to_multiple_of: round the width of a batch up to it.
        others: arguments of Unsloth's that nothing here follows, with the values that ask for nothing.

    Raises:
        ModelError: the model does not see, or the processor knows no images.
        SettingsError: one part without the other, parts or ``last_response_only`` where everything trains, or a
            ``resize`` that is none.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_seq_length: int | None = None,
        *,
        resize: Resize | Literal["min"] = None,
        train_on_responses_only: bool = True,
        instruction_part: str | None = None,
        response_part: str | None = None,
        last_response_only: bool = False,
        pad_to_multiple_of: int | None = None,
        **others: Any,
    ) -> None:
        refuse_others("VisionDataCollator", others, _OTHERS, inspect.signature(VisionDataCollator).parameters)
        if not has_vision(model.config):
            raise ModelError(f"{type(model).__name__} is no vision-language model: leave data_collator out.")
        if not hasattr(processor, "image_processor"):
            raise ModelError(
                f"{type(processor).__name__} knows no images. Give the processor that FastVisionModel.from_pretrained "
                "returns."
            )
        if last_response_only and not train_on_responses_only:
            raise SettingsError("last_response_only=True trains one answer, train_on_responses_only=False every token.")
        resize = check_resize(None if resize == "min" else resize)
        self.processor = processor
        self.max_seq_length = max_seq_length
        self.train_on: TrainOn = "last" if last_response_only else "assistant" if train_on_responses_only else "all"
        self.encoder = VisionEncoder(
            processor,
            train_on=self.train_on,
            instruction_part=instruction_part,
            response_part=response_part,
            resize=resize,
        )
        self.join = ImageCollator(processor, resize=resize, multiple=pad_to_multiple_of or 1)
        self._longest = max_seq_length or facts_of(model).window

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of ``rows``: what the model takes, and labels that are -100 where nothing is trained.

        Raises:
            DataError: a row cannot be used, or is longer than ``max_seq_length``.
        """
        import torch

        documents = [document for number, row in enumerate(rows) for document in self._encode(number, row)]
        dataset = DocumentDataset(documents)
        batch = self.join([dataset[index] for index in range(len(dataset))])
        labels = torch.full((batch["input_ids"].numel(),), IGNORED)
        labels[batch["rows"] + 1] = batch["targets"]
        given = {name: value for name, value in batch.items() if name not in ImageCollator.OWN}
        return {**given, "labels": labels.view(batch["input_ids"].shape)}

    def _encode(self, number: int, row: Mapping[str, Any]) -> list[Document]:
        where = f"row {number} of the batch"
        try:
            documents = self.encoder.encode(to_example(SourceRow(dict(row), where)))
        except RowRefusedError as refusal:
            raise DataError(f"{where}: {refusal}") from refusal
        longest = max(map(len, documents))
        if longest > self._longest:
            raise DataError(f"{where}: {longest:,} tokens, max_seq_length is {self._longest:,}. Leave the row out.")
        return documents


def encoder_for(model: Any, processing_class: Any, args: SFTConfig, collator: Any) -> ExampleEncoder:
    """Return what turns rows into documents, and write what ``collator`` says about them into ``args``.

    Raises:
        SettingsError: the collator is none of ours, it and ``args`` disagree, or an argument of vision scripts is given
            without it.
    """
    if collator is not None and not isinstance(collator, VisionDataCollator):
        raise SettingsError(
            f"data_collator is a {type(collator).__name__}: the trainer joins documents itself. Leave it out; for rows "
            "with images give a VisionDataCollator."
        )
    if args.dataset_kwargs not in (None, {}) and (collator is None or args.dataset_kwargs != _SKIP):
        raise SettingsError(
            f"dataset_kwargs={args.dataset_kwargs!r}: the trainer prepares rows itself, and takes only {_SKIP}, beside "
            "a VisionDataCollator. Leave it out."
        )
    if not has_vision(model.config):
        return ExampleEncoder(getattr(processing_class, "tokenizer", processing_class), train_on=args.train_on)
    if args.packing:
        raise SettingsError(
            "packing=True fills bins with text; rows of a vision-language model are padded. Leave it out."
        )
    if collator is None:
        return encoder_of(processing_class, args.train_on)
    for name, own in (("max_length", collator.max_seq_length), ("train_on", collator.train_on)):
        asked = getattr(args, name)
        if own is not None and asked not in (None, own):
            raise SettingsError(f"{name}={asked!r} in args, but the VisionDataCollator has {own!r}. Give one of them.")
        setattr(args, name, asked or own)
    return collator.encoder


_SKIP = {"skip_prepare_dataset": True}


def head_for(model: Any, args: SFTConfig) -> LossHead:
    """Return the loss of a transformers model.

    Raises:
        NotSupportedYetError: noise on the embeddings of a vision-language model.
    """
    if not has_vision(model.config):
        return LossHead(model, noise_alpha=args.neftune_noise_alpha, label_smoothing=args.label_smoothing_factor)
    if args.neftune_noise_alpha is not None:
        raise NotSupportedYetError("neftune_noise_alpha on a vision-language model is not supported yet. Leave it out.")
    return VisionHead(
        model,
        label_smoothing=args.label_smoothing_factor,
        vision=towers(model)["vision"],
        bookkeeping=ImageCollator.OWN,
    )


def collator_for(model: Any, processing_class: Any, collator: Any) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Return what joins documents into a batch."""
    if not has_vision(model.config):
        return JOINED
    return ImageCollator(processing_class) if collator is None else collator.join
