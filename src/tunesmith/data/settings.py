"""Settings that say what is trained on. Their meaning is the contract of ``tunesmith train`` and ``inspect``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.core.settings import Guide, Settings

__all__ = ["DataSettings"]


class DataSettings(Settings):
    """Which rows, how they are read, and which tokens carry loss."""

    data: str
    """Training rows: a file (.jsonl .json .csv .parquet .arrow .txt), a folder with train/valid/test files, or a hub
    id."""

    eval_data: str | None = None
    """Evaluation rows; none sets rows of `data` apart (see eval_split) or uses the folder's valid file."""

    eval_split: Annotated[
        float, Field(ge=0, lt=1), Guide("0.02 to 0.1", "eval loss is noisy; 0: none", "fewer rows to train on")
    ] = 0.05
    """Share of rows set apart for evaluation when there is no eval_data, at most 500 rows; 0 for none."""

    map: dict[str, str] | None = None
    """Column names and what they hold, for example {"question": "user", "answer": "assistant"}; with another task than
    CAUSAL_LM {"headline": "text", "is_sarcastic": "label"}."""

    train_on: Annotated[
        Literal["assistant", "all", "last"] | None,
        Guide("leave out", "assistant: the model learns to answer", "all: it also learns to write the questions"),
    ] = None
    """Which tokens carry loss: the assistant's turns, all, or the last assistant turn; none means assistant for
    conversations and prompt-completion rows, all for text."""

    on_too_long: Annotated[
        Literal["drop", "error", "truncate"],
        Guide("drop", "drop: such rows teach nothing", "truncate: answers may be cut, the model learns to stop early"),
    ] = "drop"
    """What happens to a row longer than max_length; every case is counted."""

    packing: Annotated[
        bool, Guide("off", "the batch size counts documents", "bins of max_length are filled, the batch counts bins")
    ] = False
    """Fill bins of max_length with whole documents; documents never see each other either way."""

    limit: Annotated[int | None, Field(ge=1)] = None
    """Read only the first rows of the data, for a trial."""
