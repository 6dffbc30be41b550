"""Rows with images -> documents -> batches, through the processor of a vision-language model.

Masks are made as for text (``masks.py``): answers are found in the rendering of the processor's own chat template, in
which one placeholder stands for each image. Then the processor says what each placeholder becomes (so many image
tokens, with newlines around them in gemma3), the whole is tokenized, and the characters behind every token are counted
in the rendering. Tokens of an image never carry loss.

A document keeps its images as the row holds them; pixels are computed anew for each batch, by the processor, whose
token ids must be those that were masked.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import DataError, ModelError
from tunesmith.data.collate import IGNORED
from tunesmith.data.images import Resize, digest_of, open_image
from tunesmith.data.masks import ExampleEncoder
from tunesmith.data.tokens import SpanTokenizer, TokenSpans
from tunesmith.data.turns import ChatRenderer
from tunesmith.data.types import Conversation, Document, Example, Images, RowRefusedError, Text, TrainOn

__all__ = ["ImageCollator", "VisionEncoder", "encoder_of"]


@dataclass(frozen=True, slots=True, eq=False)
class _ImageSpans(TokenSpans):
    """Tokens of a rendering with images; ``is_image`` (T,) are those that stand for one."""

    text: str
    is_image: NDArray[np.bool_]
    count: int


class _ImageTokens:
    """Tokenizes renderings of the row that it was last shown (:meth:`show`); in place of a ``SpanTokenizer``."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._plain = SpanTokenizer(processor.tokenizer)
        self._replacements: list[str] = []
        self.placeholder = str(getattr(processor, "image_token", "") or "")
        if not self.placeholder or not hasattr(processor, "get_text_with_replacements"):
            raise ModelError(
                f"{type(processor).__name__} does not say which tokens stand for an image. Use a model whose processor "
                "does (image_token), and transformers 5.23 or newer."
            )

    def show(self, images: Sequence[Any], where: str = "") -> None:
        """Ask the processor what a placeholder becomes for each of the opened ``images`` of the row at ``where``."""
        self._replacements = []
        if images:
            with _named(where):
                made = self._processor(
                    text=[self.placeholder * len(images)],
                    images=[list(images)],
                    add_special_tokens=False,
                    return_text_replacement_offsets=True,
                )
            self._replacements = [found["replacement"] for found in made["text_replacement_offsets"][0]]

    def tokenize(self, text: str) -> TokenSpans:
        """Return the tokens of ``text`` with its images, and the characters of ``text`` that each stands for."""
        pieces = text.split(self.placeholder)
        if len(pieces) == 1 or not self._replacements:
            return self._plain.tokenize(text)
        used = self._replacements[: len(pieces) - 1]
        expanded = "".join(part for pair in zip(pieces, [*used, ""], strict=True) for part in pair)
        tokens = self._plain.tokenize(expanded)
        # Where images lie, in the expanded text and in the rendering.
        long, short = _places(pieces, used), _places(pieces, [self.placeholder] * len(used))
        starts, ends = tokens.starts.copy(), tokens.ends.copy()
        is_image = np.zeros(len(tokens.ids), dtype=np.bool_)
        for (start, end), (first, last) in zip(long, short, strict=True):
            is_image |= tokens.overlapping(start, end)
            inside = (tokens.starts >= start) & (tokens.starts < end)
            starts[inside] = first
            ends[(tokens.ends > start) & (tokens.ends <= end)] = last
            starts[tokens.starts >= end] = (tokens.starts - end + last)[tokens.starts >= end]
            ends[tokens.ends > end] = (tokens.ends - end + last)[tokens.ends > end]
        return _ImageSpans(tokens.ids, starts, ends, text, is_image, len(used))

    def with_default_start(self, tokens: TokenSpans) -> TokenSpans:
        """See :meth:`SpanTokenizer.with_default_start`; a rendering with images has what its template writes."""
        return tokens if isinstance(tokens, _ImageSpans) else self._plain.with_default_start(tokens)


@contextmanager
def _named(where: str) -> Generator[None]:
    """Name the rows whose images a processor refuses."""
    try:
        yield
    except ValueError as error:
        raise DataError(
            f"{where}: the processor refuses an image: {error}. Crop or resize it, or leave the row out."
        ) from error


def _places(pieces: Sequence[str], between: Sequence[str]) -> list[tuple[int, int]]:
    """Return where each text of ``between`` lies when they are joined in turn with ``pieces``."""
    found: list[tuple[int, int]] = []
    position = 0
    for piece, text in zip(pieces, between, strict=False):
        position += len(piece)
        found.append((position, position + len(text)))
        position += len(text)
    return found


class VisionEncoder(ExampleEncoder):
    """Turns examples, with images or without, into documents for one processor.

    Args:
        processor: its tokenizer must be a fast one; its chat template renders conversations, the tokenizer's where it
            has none.
        train_on, instruction_part, response_part: as in :class:`ExampleEncoder`; with both parts, the answers of
            conversations too are found by them.
        resize: what is done to images first.

    Raises:
        ModelError: the tokenizer is slow, or the processor does not say which tokens stand for an image.
        SettingsError: see :class:`ExampleEncoder`.
    """

    def __init__(
        self,
        processor: Any,
        *,
        train_on: TrainOn | None = None,
        instruction_part: str | None = None,
        response_part: str | None = None,
        resize: Resize = None,
    ) -> None:
        super().__init__(
            processor.tokenizer, train_on=train_on, instruction_part=instruction_part, response_part=response_part
        )
        template = processor.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        self._renderer = ChatRenderer(processor.tokenizer, template)
        self._images = _ImageTokens(processor)
        self._tokens = self._images  # type: ignore[assignment]
        self._resize = resize
        self._row = ((), b"")
        self._takes_parts: bool | None = None

    def encode(self, example: Example) -> list[Document]:
        """Return the documents of one row; at least one. As :meth:`ExampleEncoder.encode`, and

        Raises:
            DataError: an image of the row cannot be read, or the processor refuses it.
        """
        if not isinstance(example, Conversation):
            self._images.show(())
            return super().encode(example)
        count, example = len(example.images), self._show(example)
        whole = self._checked_rendering(example)
        places = whole.count(self._images.placeholder)
        if places != count:
            raise RowRefusedError(
                "images do not match", f"the chat template writes {places} places for the {count} images of the row"
            )
        if self._given_parts != (None, None):
            return [self._encode_rendered_text(Text(whole, example.where))]
        return super().encode(example)

    def check_inference_agreement(self, conversation: Conversation) -> list[str]:
        """See :meth:`ExampleEncoder.check_inference_agreement`."""
        return super().check_inference_agreement(self._show(conversation))

    def _show(self, conversation: Conversation) -> Conversation:
        """Open the images of a row for what is tokenized next, and return its messages as the template takes them."""
        opened = [open_image(image, conversation.where, resize=self._resize) for image in conversation.images]
        self._images.show(opened, conversation.where)
        self._row = (conversation.images, digest_of(opened))
        return replace(conversation, messages=[self._as_template_wants(m) for m in conversation.messages], images=())

    def _as_template_wants(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the message with its text as a part, which templates of vision models want, if this one takes it."""
        content = message["content"]
        if not isinstance(content, str) or not self._parts_are_shown():
            return message
        return {**message, "content": [{"type": "text", "text": content}]}

    def _parts_are_shown(self) -> bool:
        if self._takes_parts is None:
            word = "tunesmithprobe"
            try:
                shown = self._renderer.render([{"role": "user", "content": [{"type": "text", "text": word}]}])
            except RowRefusedError:
                shown = ""
            # A template of text alone writes the list as Python would.
            self._takes_parts = word in shown and f"'{word}'" not in shown
        return self._takes_parts

    def _finish(
        self, tokens: TokenSpans, trained: NDArray[np.bool_], where: str, ends: Sequence[int], notes: Iterable[str]
    ) -> Document:
        if not isinstance(tokens, _ImageSpans):
            return super()._finish(tokens, trained, where, ends, notes)
        document = super()._finish(tokens, trained & ~tokens.is_image, where, ends, notes)
        values, digest = self._row
        return replace(document, images=Images(tokens.text, values[: tokens.count], digest))


def encoder_of(processing_class: Any, train_on: TrainOn | None) -> ExampleEncoder:
    """Return what turns rows into documents for a tokenizer, or for a processor of images."""
    sees = hasattr(processing_class, "image_processor")
    return (VisionEncoder if sees else ExampleEncoder)(processing_class, train_on=train_on)


class ImageCollator:
    """Joins documents of a vision-language model into one padded batch. For a ``DataLoader``.

    Takes a list of features as ``DocumentDataset`` gives them. Returns, for B documents of at most T tokens: what the
    model takes - ``input_ids``, ``attention_mask`` (B, T) int64 and what the processor makes of the images - and

    ============== ============= ==========================================================================
    rows           (N,) int64    positions in the flattened (B * T) axis whose next token is trained
    targets        (N,) int64    those next tokens
    tokens         int           tokens of the documents, without padding
    lengths        list of int   tokens of each document
    where          list of str   the source row of each document
    ============== ============= ==========================================================================
    """

    OWN = ("rows", "targets", "tokens", "lengths", "where")

    def __init__(self, processor: Any, *, resize: Resize = None, multiple: int = 1) -> None:
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._resize = resize
        self._multiple = multiple

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join ``features``; see the class.

        Raises:
            DataError: an image cannot be read any more, is refused, or is another than the one that was masked.
        """
        import torch

        lengths = [len(feature["input_ids"]) for feature in features]
        width = -(-max(lengths) // self._multiple) * self._multiple
        ids = np.full((len(features), width), self._tokenizer.pad_token_id or 0, dtype=np.int64)
        labels = np.full((len(features), width), IGNORED, dtype=np.int64)
        mask = np.zeros((len(features), width), dtype=np.int64)
        for row, feature in enumerate(features):
            ids[row, : lengths[row]] = feature["input_ids"]
            labels[row, : lengths[row]] = feature["labels"]
            mask[row, : lengths[row]] = 1
        labels[:, 0] = IGNORED  # nothing stands before it
        trained = np.flatnonzero(labels != IGNORED)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            **self._of_images(features, (len(features), width)),
            "rows": torch.from_numpy(trained - 1),
            "targets": torch.from_numpy(labels.reshape(-1)[trained]),
            "tokens": sum(lengths),
            "lengths": lengths,
            "where": [place for feature in features for place in feature["where"]],
        }

    def _of_images(self, features: Sequence[Mapping[str, Any]], shape: tuple[int, int]) -> dict[str, Any]:
        """Return what the model takes beside ids and mask, for the documents that have images."""
        import torch

        rows = [row for row, feature in enumerate(features) if feature["images"][0] is not None]
        if not rows:
            return {}
        shown: list[Images] = [features[row]["images"][0] for row in rows]
        opened = [
            [open_image(image, features[row]["where"][0], resize=self._resize) for image in images.values]
            for row, images in zip(rows, shown, strict=True)
        ]
        with _named(", ".join(features[row]["where"][0] for row in rows)):
            made = self._processor(
                text=[images.text for images in shown],
                images=opened,
                add_special_tokens=False,
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
        found = {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")}
        for at, row in enumerate(rows):
            expected = np.asarray(features[row]["input_ids"])
            if not np.array_equal(made["input_ids"][at, : len(expected)].numpy(), expected):
                raise DataError(
                    f"{features[row]['where'][0]}: its images are no longer those that were read before the run."
                )
        for name, value in found.items():
            if isinstance(value, torch.Tensor) and value.shape == made["input_ids"].shape:
                # One value a token: back to the rows and the width of this batch.
                whole = value.new_zeros(shape)
                for at, row in enumerate(rows):
                    length = len(features[row]["input_ids"])
                    whole[row, :length] = value[at, :length]
                found[name] = whole
        return found
