"""Real rows for the examples, from the package evals: pip install --no-deps evals==3.0.1.post1

What it holds and under which licence is in its own files; nothing of it is copied here.
"""

import importlib.metadata
import json
import random
import re
from pathlib import Path
from typing import Any


def evals_rows(name: str) -> list[tuple[str, str]]:
    """Return (question, ideal answer) of a set in ``evals``, shuffled with a fixed seed."""
    wanted = f"data/{name}/samples.jsonl"
    file = next(file for file in importlib.metadata.files("evals") or () if str(file).endswith(wanted))
    lines = Path(str(file.locate())).read_text(encoding="utf-8").splitlines()
    rows = [(row["input"][-1]["content"], row["ideal"]) for row in map(json.loads, lines)]
    random.Random(0).shuffle(rows)
    return rows


def tagged_sentences() -> list[dict[str, Any]]:
    """Return sentences of loan agreements in which something is named, as words with BIO tags (set ner_finance)."""
    found = []
    for text, ideal in evals_rows("ner_finance"):
        words = text.split()
        tags, at = ["O"] * len(words), 0
        for name, kind in re.findall(r"([^,\[\]][^\[\]]*?) - (PERSON|ORGANIZATION|LOCATION)", ideal):
            parts = name.strip(" ,").split()
            # Names come in the order in which they stand in the sentence.
            start = next((i for i in range(at, len(words)) if words[i : i + len(parts)] == parts), None)
            if start is not None:
                at = start + len(parts)
                tags[start:at] = [f"B-{kind[:3]}"] + [f"I-{kind[:3]}"] * (len(parts) - 1)
        if set(tags) != {"O"}:
            found.append({"tokens": words, "tags": tags})
    return found
