"""The loss of packed batches against transformers' own forward, document by document, in every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import tiny
from tests.training.support import adapted, trainable

from tunesmith.data.collate import IGNORED, DocumentCollator
from tunesmith.engine.attention import use_document_attention
from tunesmith.engine.head import LossHead

# Mamba's mixer reads its projections' weights directly: only in_proj can carry an adapter.
TARGETS = {"mamba": ["in_proj"]}


def features(*lengths: int, answers_only: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(tiny.VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        if answers_only:
            labels[: max(1, length // 2)] = IGNORED
        made.append({"input_ids": ids.numpy(), "labels": labels.numpy()})
    return made


def own_loss(model: Any, documents: list[dict[str, Any]]) -> torch.Tensor:
    """Transformers' own loss, one document at a time, as a mean over all trained tokens."""
    total, count = torch.zeros(()), 0
    for document in documents:
        ids, labels = (torch.from_numpy(document[name])[None] for name in ("input_ids", "labels"))
        trained = int((labels[:, 1:] != IGNORED).sum())
        if trained:
            total = total + model(input_ids=ids, labels=labels, use_cache=False).loss * trained
            count += trained
    return total / count


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def probed(model: Any) -> LossHead:
    head = LossHead(model.get_base_model() if hasattr(model, "get_base_model") else model)
    head.probe()
    return head


def assert_close(ours: torch.Tensor, exact: torch.Tensor, relative: float, what: str) -> None:
    error, largest = float((ours - exact).abs().max()), float(exact.abs().max())
    assert error <= relative * largest + 1e-12, f"{what}: {error:.3g} of {largest:.3g}"


@pytest.mark.parametrize("answers_only", [False, True], ids=["all tokens", "answers only"])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.HYBRIDS, *tiny.OWN_ATTENTION])
def test_loss_and_gradients_equal_transformers_own(family: str, answers_only: bool) -> None:
    model = adapted(family, target_modules=TARGETS.get(family, "all-linear"))
    twin = copy.deepcopy(model)
    # Eager is the one implementation that computes every family's softcap and sinks.
    twin.get_base_model().set_attn_implementation("eager")
    documents = features(7, 1, 23, 2, 12, answers_only=answers_only)
    head = probed(model)
    assert head.joins_documents == (family in tiny.FAMILIES), head.reasons
    assert head.skips_logits, head.reasons

    batch = DocumentCollator()(documents)
    loss = head.loss(batch, len(batch["rows"]))
    loss.backward()
    expected = own_loss(twin, documents)
    expected.backward()

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, exact = gradients(model), gradients(twin)
    assert ours.keys() == exact.keys()
    assert len(ours) == len(trainable(model))
    for name, gradient in ours.items():
        assert_close(gradient, exact[name], 1e-4, name)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "lfm2"])
def test_packed_equals_one_document_at_a_time(family: str) -> None:
    model = adapted(family)
    documents = features(9, 14, 3)
    head = probed(model)
    together = DocumentCollator()(documents)
    total = len(together["rows"])
    head.loss(together, total).backward()
    packed = {name: gradient.clone() for name, gradient in gradients(model).items()}
    loss = head.loss(together, total).item()
    model.zero_grad()
    alone = 0.0
    for document in documents:
        part = head.loss(DocumentCollator()([document]), total)
        part.backward()
        alone += part.item()
    assert loss == pytest.approx(alone, rel=1e-5)
    for name, gradient in gradients(model).items():
        assert_close(packed[name], gradient, 1e-4, name)


@pytest.mark.parametrize("family", [*tiny.HYBRIDS, *tiny.OWN_ATTENTION])
def test_a_model_that_would_leak_is_not_joined(family: str) -> None:
    head = probed(adapted(family, target_modules=TARGETS.get(family, "all-linear")))
    assert not head.joins_documents
    assert head.reasons == ["documents run one at a time: joined on one axis they would see each other"]


def test_a_projection_of_its_own_goes_through_full_logits() -> None:
    """A head that is no plain matrix product: the probe sees it, and the loss is still that model's own."""

    class Squared(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) ** 2 / 10

    model = tiny.tiny_model("llama")
    plain = model.lm_head
    model.lm_head = Squared(plain.in_features, plain.out_features, bias=False)
    model.lm_head.weight = plain.weight
    use_document_attention(model)
    head = probed(model)
    assert not head.skips_logits
    assert "loss through full logits" in head.reasons[0]
    documents = features(9, 5)
    batch = DocumentCollator()(documents)
    assert head.loss(batch, len(batch["rows"])).item() == pytest.approx(own_loss(model, documents).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "setting"), [("CohereConfig", {"logit_scale": 0.3}), ("GraniteConfig", {"logits_scaling": 4.0})]
)
def test_logit_scales_of_other_families(family: str, setting: dict[str, float]) -> None:
    import transformers

    config = getattr(transformers, family)(**{**tiny._COMMON, **setting})
    model = transformers.AutoModelForCausalLM.from_config(config)
    use_document_attention(model)
    head = probed(model)
    assert head.skips_logits
    documents = features(9, 5)
    batch = DocumentCollator()(documents)
    assert head.loss(batch, len(batch["rows"])).item() == pytest.approx(own_loss(model, documents).item(), rel=1e-5)


def test_probing_changes_nothing() -> None:
    model = adapted()
    model.train()
    state = torch.get_rng_state()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    probed(model)
    assert model.training and model.get_base_model().training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert not gradients(model)


def test_a_batch_without_trained_tokens_gives_zero_gradients() -> None:
    model = adapted()
    document = features(6)[0]
    document["labels"][:] = IGNORED
    loss = probed(model).loss(DocumentCollator()([document]), 5.0)
    loss.backward()
    assert loss.item() == 0.0
    found = gradients(model)
    assert found.keys() == trainable(model).keys()
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_checkpointing_changes_nothing(family: str) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapted(family, use_gradient_checkpointing=checkpointing, lora_dropout=0.3)
        layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(layers) == checkpointing
        batch = DocumentCollator()(features(9, 14, 3))
        torch.manual_seed(5)
        loss = probed(model).loss(batch, 10.0)
        loss.backward()
        results.append((loss, gradients(model)))
    (loss, ours), (again, recomputed) = results
    assert torch.equal(loss, again)
    assert ours.keys() == recomputed.keys()
    for name, gradient in ours.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_noise_is_added_in_training_only_and_scaled_per_document() -> None:
    model = adapted()
    head = LossHead(model.get_base_model(), noise_alpha=7.0)
    batch = DocumentCollator()(features(4, 100))
    quiet = LossHead(model.get_base_model())
    model.eval()
    assert torch.equal(head.loss(batch, 1.0), quiet.loss(batch, 1.0))
    model.train()
    assert not torch.equal(head.loss(batch, 1.0), quiet.loss(batch, 1.0))

    embedded = model.get_input_embeddings()(batch["input_ids"])
    noise = (head._noisy(batch["input_ids"], batch["cu_seqlens"]) - embedded)[0].detach()
    for part, length in ((noise[:4], 4), (noise[4:], 100)):
        bound = 7.0 / (length * 32) ** 0.5
        assert 0.9 * bound < float(part.abs().max()) <= bound * (1 + 1e-5)


@pytest.mark.parametrize("skips_logits", [True, False])
def test_label_smoothing_is_that_of_transformers_and_for_training_only(skips_logits: bool) -> None:
    from transformers.modeling_outputs import CausalLMOutput
    from transformers.trainer_pt_utils import LabelSmoother

    model = adapted("llama")
    head = probed(model)
    head.label_smoothing, head.skips_logits = 0.2, skips_logits
    (document,) = features(23, answers_only=True)
    batch = DocumentCollator()([document])
    ids, labels = (torch.from_numpy(document[name])[None] for name in ("input_ids", "labels"))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        smoothed = LabelSmoother(0.2)(CausalLMOutput(logits=logits), labels, shift_labels=True)
        assert_close(head.loss(batch, len(batch["rows"])), smoothed, 1e-5, "smoothed")
        model.eval()
        assert_close(head.loss(batch, len(batch["rows"])), own_loss(model, [document]), 1e-5, "plain")
