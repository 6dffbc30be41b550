"""The three shapes a row takes on its way from a file to the model.

    SourceRow        one raw row and the place it came from            (files.py)
    Conversation |
    Completion |
    Text | Tokens    the same row, its schema understood               (formats.py)
    Document         token ids and which of them carry loss            (masks.py)

Nothing here computes; every module of this folder speaks these types.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Completion",
    "Conversation",
    "Document",
    "Example",
    "Images",
    "RowRefusedError",
    "SourceRow",
    "Text",
    "Tokens",
    "TrainOn",
]

TrainOn = Literal["assistant", "all", "last"]


class RowRefusedError(Exception):
    """One row cannot be used. Caught by the data step, which counts it in the ledger; users never see a traceback.

    ``reason`` is a short category that the ledger counts ("no assistant turn"); ``str(error)`` is the full sentence.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as read. ``where`` names the place for messages: ``"train.jsonl:12"``."""

    value: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages ready for a tokenizer's chat template.

    ``messages`` are plain dicts (``role``, ``content`` and, where present, ``tool_calls``, ``name`` and the like).
    ``train`` has one entry a message: True or False where the row says so itself, None where ``train_on`` decides.
    ``images`` are what the row holds (see ``images.py``), in the order of their places: a message with images has a
    list of parts as its content, among them ``{"type": "image"}``.
    """

    messages: list[dict[str, Any]]
    train: tuple[bool | None, ...]
    where: str
    schema: str
    tools: list[dict[str, Any]] | None = None
    images: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A plain prompt and its plain completion; no template is applied, EOS is appended unless present."""

    prompt: str
    completion: str
    where: str
    schema: str = "prompt-completion"


@dataclass(frozen=True, slots=True)
class Text:
    """Raw or pre-rendered text."""

    text: str
    where: str
    schema: str = "text"


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row that somebody has tokenized and masked already; see :class:`Document`."""

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    where: str
    schema: str = "tokens"


Example = Conversation | Completion | Text | Tokens


@dataclass(frozen=True, slots=True)
class Images:
    """What a document shows beside its text.

    Attributes:
        text: the rendering, in which one placeholder stands for each image.
        values: the images as the row holds them, in that order; they are opened again for each batch.
        digest: a hash of their pixels.
    """

    text: str
    values: tuple[Any, ...]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids of one training document and which of them carry loss.

    Attributes:
        input_ids: (T,) int32.
        trained: (T,) bool; ``trained[t]`` means that predicting token ``t`` from the tokens before it is trained.
        end_of_turn: positions in ``input_ids`` of the tokens that end the assistant turns being trained.
        where: the source row, for messages.
        notes: short categories of anything the ledger must count ("inference prompt differs", "split by turn").
        images: what its image tokens stand for, None without.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    where: str
    end_of_turn: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=())
    images: Images | None = None

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)
