"""A few of the rows that a run was trained on, for comparing what is exported with what was trained."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.errors import TunesmithError
from tunesmith.core.settings import read_yaml
from tunesmith.data.files import read_rows
from tunesmith.data.formats import to_example
from tunesmith.data.masks import ExampleEncoder
from tunesmith.data.types import RowRefusedError

__all__ = ["probes_of_run"]

_ROWS = 4


def probes_of_run(folder: Path, tokenizer: Any) -> list[np.ndarray]:
    """Return the token ids of the first usable rows of the run in ``folder``; none where its data are not there.

    ``folder`` is that of the run or of its adapter.
    """
    for place in (folder, folder.parent):
        if (place / "settings.yaml").is_file():
            settings = read_yaml(place / "settings.yaml")
            break
    else:
        return []
    encoder = ExampleEncoder(tokenizer, train_on=settings.get("train_on"))
    found: list[np.ndarray] = []
    try:
        for row in islice(read_rows(settings["data"]), 10 * _ROWS):
            try:
                documents = encoder.encode(to_example(row, settings.get("map")))
            except RowRefusedError:
                continue
            found += [document.input_ids for document in documents]
            if len(found) >= _ROWS:
                break
    except TunesmithError:
        return []  # the data were moved or need a network: the fixed texts are compared
    return found[:_ROWS]
