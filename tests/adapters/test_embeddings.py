"""Embedding and output head that train whole: tied or not, they are saved and loaded as they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.core.errors import AdapterError, SettingsError

from ..training.support import trainer

IDS = torch.arange(40)[None] * 7 % 300
BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untied and a tied model."""
    made: dict[str, Path] = {}
    for name, family in (("untied", "llama"), ("tied", "qwen3")):
        made[name] = tmp_path_factory.mktemp("embeddings") / name
        tiny.save_model(made[name], family)
    return made


def load(folder: Path) -> Any:
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=256, dtype="float32")[0]


def adapt(folder: Path, **arguments: Any) -> Any:
    return FastLanguageModel.get_peft_model(load(folder), r=4, **arguments)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def weights(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    base = model.get_base_model()
    return base.get_input_embeddings().weight, base.get_output_embeddings().weight


ACCEPTED = [
    ("untied", ["embed_tokens"], False),
    ("untied", ["lm_head"], False),
    ("untied", BOTH, False),
    ("tied", BOTH, False),
    ("tied", BOTH, True),
    ("tied", ["embed_tokens"], True),
    ("tied", ["lm_head"], True),
]


@pytest.mark.parametrize(("name", "modules", "tying"), ACCEPTED, ids=str)
def test_trained_saved_and_loaded_again(
    name: str, modules: list[str], tying: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = adapt(folders[name], modules_to_save=modules, ensure_weight_tying=tying)
    before = [weight.detach().clone() for weight in weights(model)]
    run = trainer(tmp_path / "run", model=model, max_steps=4, learning_rate=1e-2)
    assert run.head.reasons == [], "the loss still needs no full logits"
    run.train()
    embedding, head = weights(model)
    assert torch.equal(embedding, head) == tying
    assert (embedding is head) == tying
    for weight, old, module in zip((embedding, head), before, BOTH, strict=True):
        assert torch.equal(weight, old) != (module in modules or tying), module
    live = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load(tmp_path / "adapter")), live, rtol=0, atol=1e-4)
    # And through transformers and PEFT alone.
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), live, rtol=0, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(load(folders[name])), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "modules", "tying"), ACCEPTED, ids=str)
def test_gradients_are_those_of_transformers(
    name: str, modules: list[str], tying: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = adapt(folders[name], modules_to_save=modules, ensure_weight_tying=tying, use_gradient_checkpointing=False)
    run = trainer(tmp_path, model=model)
    batch = next(iter(run.get_train_dataloader()))
    run.compute_loss(model, batch).backward()
    ours = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(out[batch["rows"]], batch["targets"]).backward()
    theirs = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for key, grad in theirs.items():
        assert (ours[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, key


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tied", {"modules_to_save": ["lm_head"]}, "training one copy would part them. Give ensure_weight_tying=True"),
        ("tied", {"modules_to_save": ["embed_tokens"]}, "or name both to let them part"),
        ("tied", {"target_modules": ["q_proj", "embed_tokens"]}, "an adapter on it cannot be merged. Train it whole"),
        ("tied", {"ensure_weight_tying": True}, "but no embedding is in modules_to_save"),
        ("untied", {"modules_to_save": BOTH, "ensure_weight_tying": True}, "but this model has two tensors for them"),
    ],
)
def test_what_would_part_them_in_silence(
    name: str, arguments: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(AdapterError, match=message):
        adapt(folders[name], **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules_to_save": ["embeddings"]}, "training one copy would part them. Leave it out, or name both"),
        ({"modules_to_save": ["lm_head"]}, "training one copy would part them. Leave it out, or name both"),
        ({"modules_to_save": ["embeddings"], "ensure_weight_tying": True}, "called embed_tokens, and here it is embed"),
        ({"target_modules": ["in_proj", "embeddings"]}, "an adapter on it cannot be merged. Leave it out"),
    ],
)
def test_tied_ends_of_another_name_are_not_parted_in_silence(arguments: dict[str, Any], message: str) -> None:
    model = tiny.tiny_model("mamba", tie_word_embeddings=True)
    with pytest.raises(AdapterError, match=message):
        FastLanguageModel.get_peft_model(model, **{"target_modules": ["in_proj"], **arguments})
    both = {"target_modules": ["in_proj"], "modules_to_save": ["embeddings", "lm_head"]}
    adapted = FastLanguageModel.get_peft_model(model, **both)
    assert sum("modules_to_save" in name for name, p in adapted.named_parameters() if p.requires_grad) == 2


def test_an_embedding_without_a_head_is_tied_to_nothing() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    adapted = FastLanguageModel.get_peft_model(
        model, modules_to_save=["word_embeddings"], use_gradient_checkpointing=False
    )
    assert any("word_embeddings.modules_to_save" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_the_same_call_again_returns_the_model(folders: dict[str, Path]) -> None:
    asked = {"r": 4, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = FastLanguageModel.get_peft_model(load(folders["tied"]), **asked)
    assert FastLanguageModel.get_peft_model(model, **asked) is model
    with pytest.raises(AdapterError, match="ensure_weight_tying: True -> False"):
        FastLanguageModel.get_peft_model(model, **{**asked, "modules_to_save": BOTH, "ensure_weight_tying": False})


@pytest.mark.parametrize(("asked", "rate"), [(None, 1e-3), (5e-6, 5e-6)])
def test_the_rate_of_embeddings(asked: float | None, rate: float, folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapt(folders["untied"], modules_to_save=BOTH)
    run = trainer(
        tmp_path, model=model, learning_rate=1e-2, embedding_learning_rate=asked, lr_scheduler_type="constant"
    )
    optimizer = run.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    assert {rates[id(weight)] for weight in weights(model)} == {rate}
    others = [p for key, p in model.named_parameters() if "lora_" in key]
    assert {rates[id(p)] for p in others} == {1e-2}


@pytest.mark.parametrize(("asked", "rate"), [(None, 1e-2), (5e-6, 5e-6)])
def test_the_rate_of_adapters_on_embeddings(
    asked: float | None, rate: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = adapt(folders["untied"], target_modules=["q_proj", *BOTH])
    run = trainer(
        tmp_path, model=model, learning_rate=1e-2, embedding_learning_rate=asked, lr_scheduler_type="constant"
    )
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in run.create_optimizer().param_groups for p in group["params"]}
    own = {name for name in rates if any(module in name for module in BOTH)}
    assert len(own) == 4 and {rates[name] for name in own} == {rate}
    assert {rates[name] for name in rates.keys() - own} == {1e-2}


def test_a_rate_without_effect_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    run = trainer(tmp_path, model=adapt(folders["untied"]), embedding_learning_rate=1e-5)
    with pytest.raises(SettingsError, match="embedding_learning_rate has no effect"):
        run.create_optimizer()


def test_the_rate_of_embeddings_where_all_weights_train(folders: dict[str, Path], tmp_path: Path) -> None:
    def rates(asked: float | None) -> set[float]:
        model, _ = FastLanguageModel.from_pretrained(
            str(folders["tied"]), max_seq_length=256, dtype="float32", full_finetuning=True
        )
        run = trainer(tmp_path, model=model, learning_rate=1e-3, embedding_learning_rate=asked)
        return {group["lr"] for group in run.create_optimizer().param_groups if group["params"]}

    assert rates(None) == {1e-3}
    assert rates(1e-5) == {1e-3, 1e-5}
