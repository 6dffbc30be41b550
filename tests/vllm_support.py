"""A stand-in for vLLM (``vllm_stand_in.py``) beside a tiny model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests import vllm_stand_in


@dataclass
class StandIn:
    """The folder that the stand-in reads and writes."""

    place: Path

    def say(self, **answers: Any) -> None:
        """Change what it answers from now on."""
        file = self.place / "answers.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **answers}))

    def asked(self, path: str = "/v1/completions") -> list[dict[str, Any]]:
        """Return what it was asked, without what is asked to compare."""
        file = self.place / "asked.jsonl"
        lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
        return [body for body in lines if body["path"] == path and "prompt_logprobs" not in body]

    @property
    def started(self) -> dict[str, Any]:
        """Words, environment and id of the process."""
        return json.loads((self.place / "start.json").read_text())


def stand_in_for(model: Any, tokenizer: Any, folder: Path, patch: pytest.MonkeyPatch) -> StandIn:
    """Put a command ``vllm`` on the PATH that answers as ``model`` does."""
    found = StandIn(folder / "stand-in")
    found.place.mkdir()
    found.say(base=scores_of(model, tokenizer))
    patch.setenv("VLLM_STAND_IN", str(found.place))
    patch.setenv("PATH", str(vllm_stand_in.make_command(folder / "bin")), prepend=os.pathsep)
    return found


def scores_of(model: Any, tokenizer: Any) -> dict[str, list[float]]:
    """Return the log-probabilities of the tokens of each probe, as transformers computes them."""
    import torch

    from tunesmith.export.verify import PROBES

    found = {}
    for text in PROBES:
        ids = tokenizer(text)["input_ids"][:64]
        with torch.no_grad():
            scores = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        found[",".join(map(str, ids))] = [scores[at, token].item() for at, token in enumerate(ids[1:])]
    return found
