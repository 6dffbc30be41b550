"""Is an export the model that it was made of? Its next-token distributions against those of the live model.

The live model answers probe prompts in this process; the export is loaded by the library that will use it, in a process
of its own (``python -m tunesmith.export.verify``), so that nothing of the live model can help it. Distributions are
compared, not texts: near-ties flip a greedy answer by rounding alone.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.core.errors import ExportError
from tunesmith.engine.modes import evaluation_mode

__all__ = ["PROBES", "Comparison", "Reference", "compare", "reference_of"]

PROBES = (
    "The harbour was quiet that morning, and the first boats were already far out when the fog began to lift.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total /",
    "Question: A train leaves at 9:40 and arrives at 11:05. How long does the journey take?\nAnswer:",
    '{"name": "Ada", "city": "Turin", "orders": [{"id": 17, "paid": true}, {"id": 23, "paid":',
    "Die Bibliothek ist am Montag geschlossen. Am Dienstag öffnet sie um",
)
"""Fixed texts beside those of the training data: prose, code, arithmetic, JSON and another language than English."""

_LONGEST = 64  # tokens of a probe


@dataclass(frozen=True, slots=True)
class Reference:
    """What the live model answers.

    Attributes:
        probes: token ids of each probe.
        logprobs: (T, V) float32 of each, after every token.
        dtype: in which it was computed, and in which the export is.
    """

    probes: tuple[np.ndarray, ...]
    logprobs: tuple[np.ndarray, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """How near an export is to the live model.

    Attributes:
        kl: mean KL divergence from the live model's next-token distribution, in nats.
        largest_kl: of all tokens.
        difference: largest difference of two log-probabilities among the 50 likeliest tokens.
        top1: share of tokens after which both find the same one likeliest.
        perplexity, live_perplexity: of export and live model on the probes.
        tokens: positions compared.
        runtime: what loaded the export.
    """

    kl: float
    largest_kl: float
    difference: float
    top1: float
    perplexity: float
    live_perplexity: float
    tokens: int
    runtime: str

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def reference_of(model: Any, tokenizer: Any = None, prompts: Sequence[Any] = ()) -> Reference:
    """Return what ``model`` answers to ``prompts`` (texts or token ids) and :data:`PROBES`.

    Without a tokenizer tokens drawn at random stand for the texts.
    """
    vocabulary, draw = model.get_input_embeddings().weight.shape[0], np.random.default_rng(0)
    probes: list[np.ndarray] = []
    for prompt in (*prompts, *PROBES):
        if isinstance(prompt, str):
            is_random = tokenizer is None
            prompt = draw.integers(vocabulary, size=_LONGEST // 2) if is_random else tokenizer(prompt)["input_ids"]
        probes.append(np.asarray(prompt[:_LONGEST], dtype=np.int64))
    found = [_logprobs(model, probe) for probe in probes]
    return Reference(tuple(probes), tuple(found), str(model.dtype).removeprefix("torch."))


@torch.no_grad()
def _logprobs(model: Any, probe: np.ndarray) -> np.ndarray:
    with evaluation_mode(model):
        ids = torch.as_tensor(probe, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits.float().log_softmax(-1).cpu().numpy()


def compare(reference: Reference, folder: Path, *, runtime: str = "transformers") -> Comparison:
    """Load ``folder`` in a process of its own and compare it with the live model.

    Raises:
        ExportError: the runtime cannot load it; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as place:
        probes, answers = Path(place) / "probes.npz", Path(place) / "answers.npz"
        np.savez(probes, *reference.probes)
        call = [sys.executable, "-m", "tunesmith.export.verify", str(folder), str(probes), str(answers)]
        done = subprocess.run([*call, runtime, reference.dtype], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing")
            raise ExportError(f"{runtime} cannot load what was exported: {said.strip()[:500]}")
        with np.load(answers) as loaded:
            theirs = [loaded[name] for name in loaded.files]
    return _comparison(reference, theirs, runtime)


def _comparison(reference: Reference, theirs: Sequence[np.ndarray], runtime: str) -> Comparison:
    divergences, same, differences = [], [], []
    losses: tuple[list[float], list[float]] = ([], [])
    for probe, own, other in zip(reference.probes, reference.logprobs, theirs, strict=True):
        if own.shape != other.shape:
            raise ExportError(f"the export has {other.shape[-1]} tokens in its vocabulary, the model {own.shape[-1]}.")
        own, other = own.astype(np.float64), other.astype(np.float64)
        divergences.append((np.exp(own) * (own - other)).sum(-1))
        same.append(own.argmax(-1) == other.argmax(-1))
        likeliest = np.argsort(own, axis=-1)[:, -50:]
        gap = np.take_along_axis(own, likeliest, -1) - np.take_along_axis(other, likeliest, -1)
        differences.append(np.abs(gap).max(-1))
        for into, logprobs in zip(losses, (other, own), strict=True):
            into.extend(-logprobs[np.arange(len(probe) - 1), probe[1:]])
    kl = np.concatenate(divergences)
    return Comparison(
        kl=max(0.0, float(kl.mean())),
        largest_kl=max(0.0, float(kl.max())),
        difference=float(np.concatenate(differences).max()),
        top1=float(np.concatenate(same).mean()),
        perplexity=math.exp(float(np.mean(losses[0]))),
        live_perplexity=math.exp(float(np.mean(losses[1]))),
        tokens=len(kl),
        runtime=runtime,
    )


def _answer(folder: str, probes: str, answers: str, runtime: str, dtype: str) -> None:
    """Load ``folder`` and write the log-probabilities that it gives to ``probes``."""
    if runtime == "transformers":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    elif runtime == "tunesmith":
        from tunesmith.adapters.state import load_source

        model, _ = load_source(folder, dtype=dtype, trainable=False)
    else:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    with np.load(probes) as loaded:
        found = [_logprobs(model, loaded[name]) for name in loaded.files]
    np.savez(answers, *found)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
