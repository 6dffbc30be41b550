"""Is an export the model that it was made of? Its next-token distributions against those of the live model.

The live model answers probe prompts in this process; the export is loaded by the library that will use it, in a process
of its own (``python -m tunesmith.export.verify``), so that nothing of the live model can help it. Distributions decide;
greedy texts are compared too, and only told: near-ties flip them by rounding alone. The saved tokenizer has to give the
ids and the chats that the live one gives.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.core.errors import AdapterError, ExportError
from tunesmith.core.versions import keep_softcap
from tunesmith.engine.modes import adapter_disabled, evaluation_mode
from tunesmith.models.quantize import protect_gradients
from tunesmith.models.vision import auto_class

__all__ = ["PROBES", "Comparison", "Reference", "compare", "compared", "reference_of"]

PROBES = (
    "The harbour was quiet that morning, and the first boats were already far out when the fog began to lift.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total /",
    "Question: A train leaves at 9:40 and arrives at 11:05. How long does the journey take?\nAnswer:",
    '{"name": "Ada", "city": "Turin", "orders": [{"id": 17, "paid": true}, {"id": 23, "paid":',
    "Die Bibliothek ist am Montag geschlossen. Am Dienstag öffnet sie um",
)
"""Fixed texts beside those of the training data: prose, code, arithmetic, JSON and another language than English."""

_CHATS = (
    [{"role": "user", "content": "Name a harbour town.  Just one,\nplease."}],
    [
        {"role": "user", "content": "What is 12 * 7?"},
        {"role": "assistant", "content": "84"},
        {"role": "user", "content": "Und auf Französisch?"},
    ],
)
_LONGEST = 64  # tokens of a probe
# A live model in 16 bits is itself that far from what other kernels, or those of another device, make of the same
# weights: SmolLM2-135M in bfloat16 0.003 nats, after four and ten steps at 1e-3 0.008 and 0.007, tiny random models up
# to 0.005. Where rounding sends a token to other experts it is further, a tiny random Mixtral 0.017. A broken export is
# nats away.
_ROUNDING, _ROUNDING_OF_EXPERTS = 15e-3, 2e-2
_TEXTS, _NEW_TOKENS = 3, 32  # greedy texts go on from the first tokens of the first probes


@dataclass(frozen=True, slots=True)
class Reference:
    """What the live model answers.

    Attributes:
        probes: token ids of each probe.
        logprobs: (T, V) float32 of each, after every token.
        texts: ids that follow greedily on each of the first probes.
        choices: (len(text), V) log-probabilities out of which each of these was chosen.
        tokenizer: what the tokenizer makes of texts and chats, None where there is none.
        base: what the untuned base answers to the probes; None where adapters are none or cannot be switched off.
        dtype: in which it was computed, and in which the export is.
        rounding: mean KL divergence that computing in ``dtype`` alone may bring, beside another runtime or device.
    """

    probes: tuple[np.ndarray, ...]
    logprobs: tuple[np.ndarray, ...]
    texts: tuple[np.ndarray, ...]
    choices: tuple[np.ndarray, ...]
    tokenizer: dict[str, Any] | None
    base: tuple[np.ndarray, ...] | None
    dtype: str
    rounding: float = 0.0

    @property
    def beginnings(self) -> tuple[np.ndarray, ...]:
        """What the greedy texts go on from."""
        return tuple(probe[: _LONGEST // 2] for probe in self.probes[: len(self.texts)])

    @property
    def moved(self) -> float | None:
        """Mean KL divergence of the untuned base from the live model: how far the training moved it."""
        if self.base is None:
            return None
        pairs = zip(self.logprobs, self.base, strict=True)
        return _mean(np.concatenate([_divergence(own, base) for own, base in pairs]))


@dataclass(frozen=True, slots=True)
class Comparison:
    """How near an export is to the live model.

    Attributes:
        kl: mean KL divergence from the live model's next-token distribution, in nats.
        largest_kl: of all tokens.
        difference: largest difference of two log-probabilities among the 50 likeliest tokens.
        top1: share of tokens after which both find the same one likeliest.
        kept: share of what the training changed that is still there: the component of the export's log-probabilities
            along the change from base to live model. Rounding moves them too, but hardly in that direction, so that
            this tells rounding from training that was lost. None where the base is not known.
        perplexity, live_perplexity: of export and live model on the probes.
        tokens: positions compared.
        texts: greedy continuations compared.
        equal_texts: how many of them are equal.
        text_gap: nats by which the live model preferred its own token where a text first differs, the largest; near
            zero is a near-tie that rounding decided. None where all are equal.
        tokenizer: "equal", or what the saved one does otherwise; None where none was saved.
        runtime: what loaded the export.
    """

    kl: float
    largest_kl: float
    difference: float
    top1: float
    kept: float | None
    perplexity: float
    live_perplexity: float
    tokens: int
    texts: int
    equal_texts: int
    text_gap: float | None
    tokenizer: str | None
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
            prompt = draw.integers(vocabulary, size=_LONGEST // 2) if is_random else _text(tokenizer)(prompt).input_ids
        probes.append(np.asarray(prompt[:_LONGEST], dtype=np.int64))
    found = [_logprobs(model, probe) for probe in probes]
    texts, choices = zip(*(_continued(model, probe) for probe in probes[:_TEXTS]), strict=True)
    base = None
    with suppress(AdapterError):  # the base lacks what the adapter started with
        if hasattr(model, "peft_config"):
            with adapter_disabled(model):
                base = tuple(_logprobs(model, probe) for probe in probes)
    said = None if tokenizer is None else _said(_text(tokenizer))
    dtype = str(model.dtype).removeprefix("torch.")
    return Reference(tuple(probes), tuple(found), texts, choices, said, base, dtype, _rounding(model))


def _rounding(model: Any) -> float:
    if model.dtype.itemsize > 2:
        return 0.0
    config = model.config.get_text_config()
    has_experts = any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    return _ROUNDING_OF_EXPERTS if has_experts else _ROUNDING


def _text(tokenizer: Any) -> Any:
    """Return the tokenizer of a processor, and a tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _ids(model: Any, probe: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(probe, dtype=torch.long, device=model.get_input_embeddings().weight.device)[None]


@torch.no_grad()
def _logprobs(model: Any, probe: np.ndarray) -> np.ndarray:
    with evaluation_mode(model):
        logits = model(input_ids=_ids(model, probe), use_cache=False).logits[0]
    return logits.float().log_softmax(-1).cpu().numpy()


@torch.no_grad()
def _continued(model: Any, probe: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids that follow greedily on the first half of what a probe may have, and their log-probabilities."""
    ids = _ids(model, probe[: _LONGEST // 2])
    how = {"do_sample": False, "max_new_tokens": _NEW_TOKENS, "use_cache": True, "pad_token_id": 0}  # nothing is padded
    with evaluation_mode(model):
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **how, output_logits=True, return_dict_in_generate=True
        )
    logits = torch.cat(found.logits).float().log_softmax(-1).cpu().numpy()
    return found.sequences[0, ids.shape[1] :].cpu().numpy(), logits


def _said(tokenizer: Any) -> dict[str, Any]:
    """Return what ``tokenizer`` makes of texts and chats, as JSON values."""
    import jinja2

    said: dict[str, Any] = {"ids": [tokenizer(text).input_ids for text in PROBES], "chats": []}
    if getattr(tokenizer, "chat_template", None) is None:
        return said
    said["template"] = tokenizer.chat_template
    for chat in _CHATS:
        for opens in (False, True):
            try:
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens)
            except jinja2.TemplateError as error:
                said["chats"].append(str(error))
            else:
                said["chats"].append([text, tokenizer(text, add_special_tokens=False).input_ids])
    return said


def compare(
    reference: Reference, folder: Path, *, runtime: str = "transformers", dtype: str | None = None
) -> Comparison:
    """Load ``folder`` in a process of its own and compare it with the live model.

    ``dtype`` is asked for when it is loaded, "auto" for that of its files; None: that of the live model.

    Raises:
        ExportError: the runtime cannot load it; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as place:
        probes, answers = Path(place) / "probes.npz", Path(place) / "answers.npz"
        np.savez(probes, *reference.probes)
        call = [sys.executable, "-m", "tunesmith.export.verify", str(folder), str(probes), str(answers)]
        speaks = "mute" if reference.tokenizer is None else "speaks"
        done = subprocess.run(
            [*call, runtime, dtype or reference.dtype, speaks], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing")
            raise ExportError(f"{runtime} cannot load what was exported: {said.strip()[:500]}")
        with np.load(answers) as loaded:
            theirs = {name: loaded[name] for name in loaded.files}
    return compared(reference, theirs, runtime)


def compared(reference: Reference, theirs: dict[str, np.ndarray], runtime: str) -> Comparison:
    """Return how ``theirs`` compare with the live model: ``logprobs-<n>`` of each probe, ``text-<n>`` of each text.

    And ``tokenizer`` where the reference has one.

    Raises:
        ExportError: they are over another vocabulary.
    """
    divergences, same, differences = [], [], []
    losses: tuple[list[float], list[float]] = ([], [])
    for index, (probe, own) in enumerate(zip(reference.probes, reference.logprobs, strict=True)):
        other = theirs[f"logprobs-{index}"]
        if own.shape != other.shape:
            raise ExportError(f"the export has {other.shape[-1]} tokens in its vocabulary, the model {own.shape[-1]}.")
        divergences.append(_divergence(own, other))
        same.append(own.argmax(-1) == other.argmax(-1))
        likeliest = np.argsort(own, axis=-1)[:, -50:]
        gap = np.take_along_axis(own, likeliest, -1) - np.take_along_axis(other, likeliest, -1)
        differences.append(np.abs(gap).max(-1))
        for into, logprobs in zip(losses, (other, own), strict=True):
            into.extend(-logprobs[np.arange(len(probe) - 1), probe[1:]])
    kl = np.concatenate(divergences)
    gaps = [_gap(text, logprobs, theirs[f"text-{index}"])
            for index, (text, logprobs) in enumerate(zip(reference.texts, reference.choices, strict=True))]  # fmt: skip
    return Comparison(
        kl=_mean(kl),
        largest_kl=_mean(kl.max()),
        difference=float(np.concatenate(differences).max()),
        top1=float(np.concatenate(same).mean()),
        kept=_kept(reference, theirs),
        perplexity=math.exp(float(np.mean(losses[0], dtype=np.float64))),
        live_perplexity=math.exp(float(np.mean(losses[1], dtype=np.float64))),
        tokens=len(kl),
        texts=len(gaps),
        equal_texts=sum(gap is None for gap in gaps),
        text_gap=max((gap for gap in gaps if gap is not None), default=None),
        tokenizer=_tokenizer(reference.tokenizer, theirs),
        runtime=runtime,
    )


def _divergence(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the KL divergence of ``other`` from ``own``, both (T, V) log-probabilities, after every token."""
    own, other = own.astype(np.float64), other.astype(np.float64)
    return (np.exp(own) * (own - other)).sum(-1)


def _kept(reference: Reference, theirs: dict[str, np.ndarray]) -> float | None:
    """Return <other - base, own - base> / <own - base, own - base>, tokens weighted by how likely they are."""
    along = whole = 0.0
    for index, (own, base) in enumerate(zip(reference.logprobs, reference.base or (), strict=False)):
        weighted = (np.exp(own) + np.exp(base)) / 2 * (own - base)
        along += float(np.sum(weighted * (theirs[f"logprobs-{index}"] - base), dtype=np.float64))
        whole += float(np.sum(weighted * (own - base), dtype=np.float64))
    return along / whole if whole > 0 else None


def _mean(kl: np.ndarray) -> float:
    """Return the mean of divergences: not below zero by rounding, and infinite where one is no number."""
    mean = float(np.mean(kl))
    return math.inf if math.isnan(mean) else max(0.0, mean)


def _gap(text: np.ndarray, logprobs: np.ndarray, theirs: np.ndarray) -> float | None:
    """Return by how much the live model preferred its own token where two texts first differ; None: nowhere."""
    for at, (own, other) in enumerate(zip(text, theirs, strict=False)):
        if own != other:
            return float(logprobs[at, own] - logprobs[at, other])
    return None


def _tokenizer(own: dict[str, Any] | None, theirs: dict[str, np.ndarray]) -> str | None:
    if own is None:
        return None
    said = json.loads(str(theirs["tokenizer"]))
    if said["ids"] != own["ids"]:
        return "gives other ids to the same text"
    if said["chats"] != own["chats"] or said.get("template") != own.get("template"):
        return "has another chat template"
    return "equal"


def _answer(folder: str, probes: str, answers: str, runtime: str, dtype: str, speaks: str) -> None:
    """Load ``folder`` and write what it answers to ``probes``."""
    if runtime == "transformers":
        from transformers import AutoConfig

        kind = auto_class(AutoConfig.from_pretrained(folder))
        model = kind.from_pretrained(folder, dtype=dtype)
    elif runtime == "transformers (GGUF)":
        from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

        how: dict[str, Any] = {"config": AutoConfig.from_pretrained(folder), "dtype": dtype}
        how["quantization_config"] = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", **how)
    elif runtime == "tunesmith":
        from tunesmith.adapters.state import load_source

        model, _ = load_source(folder, dtype=dtype, trainable=False)
    else:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)
    keep_softcap(model)
    protect_gradients(model)  # for what it reads wrongly; see there
    found: dict[str, Any] = {}
    with np.load(probes) as loaded:
        for index, name in enumerate(loaded.files):
            found[f"logprobs-{index}"] = _logprobs(model, loaded[name])
            if index < _TEXTS:
                found[f"text-{index}"], _ = _continued(model, loaded[name])
    if speaks == "speaks":
        from transformers import AutoTokenizer

        found["tokenizer"] = np.array(json.dumps(_said(AutoTokenizer.from_pretrained(folder))))
    np.savez(answers, **found)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
