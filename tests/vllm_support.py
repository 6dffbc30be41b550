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
        return [body for body in lines if body["path"] == path and body.get("max_tokens") != 8]

    @property
    def started(self) -> dict[str, Any]:
        """Words, environment and id of the process."""
        return json.loads((self.place / "start.json").read_text())


def stand_in_for(scores: dict[str, Any], folder: Path, patch: pytest.MonkeyPatch) -> StandIn:
    """Put a command ``vllm`` on the PATH that answers as the model of :func:`scores_of` does."""
    found = StandIn(folder / "stand-in")
    found.place.mkdir()
    found.say(base=scores)
    patch.setenv("VLLM_STAND_IN", str(found.place))
    patch.setenv("PATH", str(vllm_stand_in.make_command(folder / "bin")), prepend=os.pathsep)
    return found


def scores_of(model: Any, tokenizer: Any, less: float = 0.0) -> dict[str, Any]:
    """Return what ``model`` says to each probe, in vLLM's form, its log-probabilities lowered by ``less``."""
    import torch

    from tunesmith.export.verify import PROBES

    found = {}
    for text in PROBES:
        ids = tokenizer(text)["input_ids"][:64]
        said: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        answer: list[int] = []
        for _ in range(8):
            with torch.no_grad():
                logits = model.eval()(
                    input_ids=torch.tensor([ids + answer], device=model.device), use_cache=False
                ).logits[0, -1]
            top = (logits.log_softmax(-1) - less).topk(5)
            named = {
                f"token_id:{token}": value for token, value in zip(*map(torch.Tensor.tolist, top[::-1]), strict=True)
            }
            answer.append(top.indices[0].item())
            said["tokens"].append(f"token_id:{answer[-1]}")
            said["token_logprobs"].append(top.values[0].item())
            said["top_logprobs"].append(named)
        found[",".join(map(str, ids))] = {"token_ids": answer, "logprobs": said}
    return found
