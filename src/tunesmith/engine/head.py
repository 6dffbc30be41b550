"""The loss of a causal language model on a packed batch, without full logits, and the probes that make it safe.

A :class:`LossHead` belongs to one model instance. Before the first step it is *probed* on a few tokens: does decoder +
projection give the model's own logits, and do documents on one axis give what each gives alone? A model that fails the
first runs its own ``forward`` to the logits; one that fails the second runs its documents one at a time. Either costs
speed, never correctness, and ``reasons`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.engine.host import compute_device
from tunesmith.engine.install import engine_of
from tunesmith.ops.attention_varlen.documents import Documents
from tunesmith.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LossHead", "bounds_kwargs"]

# Relative to the largest value compared. Float32 paths differ by rounding only; 16-bit ones by a few of their own ulps.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def bounds_kwargs(cu_seqlens: torch.Tensor, max_length: int) -> dict[str, Any]:
    """Return the document bounds under the names of transformers' flash-attention interface."""
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_length,
        "max_length_k": max_length,
    }


@dataclass
class LossHead:
    """Loss of packed batches on one causal language model.

    Attributes:
        model: the unwrapped transformers model (inside PEFT: ``get_base_model()``).
        noise_alpha: NEFTune's alpha (Jain et al. 2023, arXiv:2310.05914): in training, uniform noise of
            ``alpha / sqrt(tokens of the document * D)`` is added to the embeddings.
        label_smoothing: share of each label that training spreads over the vocabulary; evaluation never does.
        reasons: one line for each fast path that the probes refused, empty when all run.
    """

    model: PreTrainedModel
    reasons: list[str] = field(default_factory=list)
    joins_documents: bool = True
    skips_logits: bool = True
    noise_alpha: float | None = None
    label_smoothing: float = 0.0

    @torch.no_grad()
    def probe(self) -> None:
        """Compare the fast paths with the model's own forward on a few tokens, and refuse those that differ."""
        was_training = self.model.training
        self.model.eval()
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(12, device=self._device) * 7919 + 11) % vocabulary
        documents = [tokens[:7], tokens[7:]]
        if type(_unwrapped(self.model.get_output_embeddings())) is not torch.nn.Linear:
            self.skips_logits = False
            self.reasons.append("loss through full logits: the output head is no plain linear layer")
        own = [self.model(input_ids=document[None], use_cache=False).logits[0] for document in documents]
        if self.skips_logits and not all(
            _agree(self._logits(self._hidden_alone(d)), o) for d, o in zip(documents, own, strict=True)
        ):
            self.skips_logits = False
            self.reasons.append("loss through full logits: the projection of this model is not hidden @ weight.T")
        self._probe_joined(tokens, documents)
        self.model.train(was_training)

    def _probe_joined(self, tokens: torch.Tensor, documents: list[torch.Tensor]) -> None:
        bounds = torch.tensor([0, 7, 12], dtype=torch.int32, device=self._device)
        positions = torch.cat([torch.arange(7), torch.arange(5)]).to(self._device)
        joined = self._hidden(tokens[None], positions[None], bounds, 7)
        if not _agree(joined, torch.cat([self._hidden_alone(document) for document in documents])):
            self.joins_documents = False
            self.reasons.append("documents run one at a time: joined on one axis they would see each other")

    def reaches(self, name: str) -> bool:
        """Say whether the losses so far depend on the parameter ``name``: here on all."""
        return True

    def loss(self, batch: dict[str, Any], divisor: float | torch.Tensor) -> torch.Tensor:
        """Return the summed loss of a packed batch over ``divisor``, a float32 scalar with a graph.

        ``batch`` is what :class:`tunesmith.data.collate.DocumentCollator` makes; with ``has_idle`` some of its rows
        have the target -100 and give nothing (``graphs.py``).
        """
        smoothing = self.label_smoothing if self.model.training else 0.0
        if self.skips_logits:
            projection = self.model.get_output_embeddings()
            return linear_cross_entropy(
                self._trained_hidden(batch),
                projection.weight,
                batch["targets"],
                bias=getattr(projection, "bias", None),
                divisor=divisor,
                logit_scale=self._logit_scale,
                softcap=self._softcap,
                label_smoothing=smoothing,
                has_idle=batch.get("has_idle", False),
            )
        logits = self._trained_logits(batch)
        return (
            torch.nn.functional.cross_entropy(
                logits.float(), batch["targets"], reduction="sum", label_smoothing=smoothing
            )
            / divisor
        )

    def _trained_logits(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return (N, V), the model's own logits of the rows that predict a trained token."""
        return torch.cat([self._own_logits(*part) for part in self._parts(batch)])[batch["rows"]]

    def _parts(self, batch: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
        if not self.joins_documents:
            return _one_by_one(batch)
        return [(batch["input_ids"], batch["position_ids"], batch["cu_seqlens"], batch["max_length"])]

    def _trained_hidden(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return (N, D), the final hidden states of the rows that predict a trained token."""
        engine = engine_of(self.model)
        if engine is None or not self.joins_documents:
            return torch.cat([self._hidden(*part) for part in self._parts(batch)])[batch["rows"]]
        with engine.batch(_documents(batch), batch["rows"]) as told:
            hidden = self._hidden(*self._parts(batch)[0])
        return hidden if told.cut else hidden[batch["rows"]]

    @property
    def _device(self) -> torch.device:
        return compute_device(self.model)

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def _softcap(self) -> float | None:
        return getattr(self._config, "final_logit_softcapping", None)

    @property
    def _logit_scale(self) -> float:
        # Cohere multiplies by logit_scale, Granite divides by logits_scaling; other names fail the probe.
        return float(getattr(self._config, "logit_scale", None) or 1.0) / float(
            getattr(self._config, "logits_scaling", None) or 1.0
        )

    def _hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_length: int
    ) -> torch.Tensor:
        decoder = self.model.get_decoder()
        bounds = bounds_kwargs(cu_seqlens, max_length)
        engine = engine_of(self.model)
        if engine is not None and engine.plan.known and not engine.plan.unknown:
            # transformers compares positions, and waits for the device, only where there is no mask.
            bounds["attention_mask"] = position_ids[0]
        inputs: dict[str, torch.Tensor] = {"input_ids": input_ids}
        if self.noise_alpha is not None and self.model.training:
            inputs = {"inputs_embeds": self._noisy(input_ids, cu_seqlens)}
        return decoder(**inputs, position_ids=position_ids, use_cache=False, **bounds).last_hidden_state[0]

    def _noisy(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        embedded = self.model.get_input_embeddings()(input_ids)
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        size = (self.noise_alpha or 0.0) / (lengths * embedded.shape[-1]).float().sqrt()
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * size.repeat_interleave(lengths)[None, :, None].to(embedded.dtype)

    def _hidden_alone(self, document: torch.Tensor) -> torch.Tensor:
        return self.model.get_decoder()(input_ids=document[None], use_cache=False).last_hidden_state[0]

    def _own_logits(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_length: int
    ) -> torch.Tensor:
        bounds = bounds_kwargs(cu_seqlens, max_length)
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **bounds).logits[0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        projection = self.model.get_output_embeddings()
        logits = torch.nn.functional.linear(hidden, projection.weight, getattr(projection, "bias", None)).float()
        logits = logits * self._logit_scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


def _documents(batch: dict[str, Any]) -> Documents:
    """Return the documents of ``batch`` with the bounds that are on the device, so that no layer copies them there."""
    given = batch["lengths"]
    return given if isinstance(given, Documents) else Documents(batch["cu_seqlens"], batch["max_length"], tuple(given))


def _unwrapped(projection: Any) -> Any:
    """Return an output head without PEFT's wrapper around one that trains whole, whose ``weight`` is the active one."""
    is_wrapper = type(projection).__name__ == "ModulesToSaveWrapper"
    return projection.original_module if is_wrapper else projection


def _one_by_one(batch: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    bounds = batch["cu_seqlens"].tolist()
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = []
    for start, end in pairwise(bounds):
        own = torch.tensor([0, end - start], dtype=torch.int32, device=batch["cu_seqlens"].device)
        parts.append((batch["input_ids"][:, start:end], batch["position_ids"][:, start:end], own, end - start))
    return parts


def _agree(ours: torch.Tensor, own: torch.Tensor) -> bool:
    tolerance = _TOLERANCE[own.dtype if own.dtype in _TOLERANCE else torch.float32]
    tolerance = max(tolerance, _TOLERANCE.get(ours.dtype, 0.0))
    return bool((ours.double() - own.double()).abs().max() <= tolerance * own.double().abs().max())
