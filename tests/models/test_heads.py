"""Models for other tasks than language modelling: loaded, labelled, with a head that is new or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny, tiny_tasks

from tunesmith import FastLanguageModel
from tunesmith.core.errors import AdapterError, ModelError, NotSupportedYetError, SettingsError
from tunesmith.core.tasks import TASKS, find_task, task_of
from tunesmith.models.embed import embed_texts
from tunesmith.models.heads import read_labels, reads
from tunesmith.models.load import DEFAULT_WINDOW, facts_of

OTHERS = [name for name in TASKS if name != "CAUSAL_LM"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tasks.save_base(tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tasks.save_base(tmp_path_factory.mktemp("bases") / "t5", "t5")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "llama"
    tiny.save_model(folder)
    return folder


def load(folder: Path, **arguments: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(folder), **{"dtype": "float32", **arguments})


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("SEQ_CLS", "BertForSequenceClassification"),
        ("token_classification", "BertForTokenClassification"),
        ("Question-Answering", "BertForQuestionAnswering"),
        ("FEATURE_EXTRACTION", "BertModel"),
        (None, "BertModel"),
    ],
)
def test_each_task_has_its_class(bert: Path, task: str | None, kind: str) -> None:
    model, _ = load(bert, task_type=task)
    assert type(model).__name__ == kind
    assert facts_of(model).task == (find_task(task).name if task else "FEATURE_EXTRACTION")
    assert "layers are transformers' own" in facts_of(model).notes[0]
    assert model.config.pad_token_id == 0


def test_encoder_decoders_and_causal_models_with_heads(t5: Path, llama: Path) -> None:
    assert facts_of(load(t5)[0]).task == "SEQ_2_SEQ_LM"
    assert type(load(llama, task_type="SEQ_CLS")[0]).__name__ == "LlamaForSequenceClassification"
    assert type(load(llama, task_type="TOKEN_CLS", num_labels=3)[0]).__name__ == "LlamaForTokenClassification"
    assert facts_of(load(llama)[0]).task == "CAUSAL_LM"


def test_auto_model_takes_the_place_of_the_tasks_own_class(bert: Path) -> None:
    from transformers import BertForSequenceClassification

    class Own(BertForSequenceClassification):
        pass

    assert type(load(bert, task_type="SEQ_CLS", auto_model=Own)[0]) is Own


def test_a_new_head_is_seeded_and_leaves_the_random_numbers_of_others_alone(bert: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (load(bert, task_type="SEQ_CLS", random_state=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert facts_of(one).new_modules == ("classifier",)


@pytest.mark.parametrize(
    "labels", [{"id2label": {0: "no", 1: "yes", 2: "maybe"}}, {"label2id": {"no": 0, "yes": 1, "maybe": 2}}]
)
def test_labels_go_into_the_config(bert: Path, labels: dict[str, Any]) -> None:
    model, _ = load(bert, task_type="SEQ_CLS", **labels)
    assert model.classifier.out_features == model.config.num_labels == 3
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 1}, "num_labels=1: a whole number of at least 2 is needed; a head for one number"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "must be numbered 0 to 2"),
        ({"id2label": {0: "a", 2: "b"}}, "must be numbered 0 to 1"),
        ({"id2label": {0: "a", 1: "a"}}, "each with a name of its own"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, "do not agree"),
    ],
)
def test_labels_that_do_not_fit_each_other(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_labels(**arguments)


@pytest.mark.parametrize("seed", [None, "7", 7.0, -1])
def test_a_seed_that_is_no_number_is_refused(bert: Path, seed: Any) -> None:
    with pytest.raises(SettingsError, match=f"random_state={seed!r}: a whole number of at least 0 is needed"):
        load(bert, task_type="SEQ_CLS", random_state=seed)


def test_a_number_alone_names_the_labels_as_transformers_does() -> None:
    assert read_labels(2) == ("LABEL_0", "LABEL_1")
    assert read_labels() is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task_type": "SEQ_CSL"}, SettingsError, "task 'SEQ_CSL' is not known. Did you mean 'seq_cls'.*Tasks are: "),
        ({"task_type": "QUESTION_ANS", "num_labels": 3}, SettingsError, "have no effect on QUESTION_ANS"),
        ({"task_type": "CAUSAL_LM", "num_labels": 3}, SettingsError, "have no effect on CAUSAL_LM"),
        ({"task_type": "SEQ_CLS", "load_in_4bit": True}, NotSupportedYetError, "load_in_4bit with task_type='SEQ_CLS'"),
        ({"task_type": "SEQ_CLS", "rope_scaling": "linear"}, NotSupportedYetError, "rope_scaling with task_type="),
        ({"task_type": "SEQ_2_SEQ_LM"}, ModelError, "Unrecognized configuration class"),
        ({"task_type": "SEQ_CLS", "use_gradient_checkpointing": "offload"}, SettingsError, "needs fused decoder"),
    ],
)
def test_requests_that_are_refused(bert: Path, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(bert, **arguments)


def test_a_saved_head_has_to_be_there_whole_and_with_its_labels(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, tokenizer = load(bert, task_type="SEQ_CLS", id2label={0: "no", 1: "yes"})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert type(again) is type(model)
    assert again.config.id2label == {0: "no", 1: "yes"}
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert facts_of(again).new_modules == ()
    with pytest.raises(ModelError, match="3 labels are asked for, and the model was saved with 2: no, yes"):
        load(tmp_path, num_labels=3)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .*classifier\.weight"):
        load(tmp_path)


def test_weights_of_the_body_have_to_be_there(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(bert / "model.safetensors")
    for name in ("encoder.layer.1.output.dense.weight", "pooler.dense.weight", "pooler.dense.bias"):
        del weights[name]
    model, tokenizer = load(bert)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .*layer\.1\.output\.dense"):
        load(tmp_path, task_type="SEQ_CLS")


def test_a_class_that_looks_for_other_weights_than_its_base_has_cannot_be_used(llama: Path) -> None:
    with pytest.raises(ModelError, match="LlamaForQuestionAnswering of transformers looks for its weights under other"):
        load(llama, task_type="QUESTION_ANS")


@pytest.mark.parametrize(("pad", "window"), [(1, 512), (0, 513)])
def test_the_window_of_roberta_begins_behind_its_padding_token(tmp_path: Path, pad: int, window: int) -> None:
    base = tiny_tasks.save_base(tmp_path / "base", "roberta", pad_token_id=pad)
    model, tokenizer = load(base, task_type="FEATURE_EXTRACTION")
    assert facts_of(model).window == window
    assert embed_texts(model, tokenizer, ["a " * 600]).shape == (1, 32)
    with pytest.raises(ModelError, match=f"max_seq_length=514 is above .* window of {window} positions"):
        load(base, task_type="FEATURE_EXTRACTION", max_seq_length=514)


@pytest.fixture
def xlnet(tmp_path: Path) -> Path:
    """Write a base that has no longest position, and whose layers transformers cannot compute again."""
    import transformers

    config = transformers.XLNetConfig(vocab_size=200, d_model=16, n_layer=1, n_head=2, d_inner=16, pad_token_id=0)
    transformers.XLNetModel(config).save_pretrained(tmp_path / "xlnet")
    tiny_tasks.tokenizer().save_pretrained(tmp_path / "xlnet")
    return tmp_path / "xlnet"


def test_a_model_without_a_longest_position_has_the_window_that_is_asked_for(xlnet: Path) -> None:
    own = {"task_type": "FEATURE_EXTRACTION"}
    assert facts_of(load(xlnet, **own)[0]).window == DEFAULT_WINDOW
    assert facts_of(load(xlnet, max_seq_length=700, **own)[0]).window == 700


def test_layers_that_cannot_be_computed_again_keep_everything_unless_that_was_asked_for(xlnet: Path) -> None:
    model = FastLanguageModel.get_peft_model(load(xlnet, task_type="FEATURE_EXTRACTION")[0], r=2)
    facts = facts_of(model)
    assert facts.checkpointing is False
    assert [note for note in facts.notes if "layers of XLNetModel cannot be computed again" in note] == facts.notes[1:]
    with pytest.raises(SettingsError, match=r"use_gradient_checkpointing=True: .* XLNetModel .* Leave it out"):
        FastLanguageModel.get_peft_model(
            load(xlnet, task_type="FEATURE_EXTRACTION")[0], use_gradient_checkpointing=True
        )


def test_a_model_of_someone_else_says_its_task() -> None:
    assert task_of("BertForTokenClassification", None) == "TOKEN_CLS"
    assert task_of("T5ForConditionalGeneration", type("C", (), {"is_encoder_decoder": True})) == "SEQ_2_SEQ_LM"
    assert task_of("Gemma3ForConditionalGeneration", type("C", (), {"is_encoder_decoder": False})) == "CAUSAL_LM"


# ---- adapters ----


@pytest.mark.parametrize("task", [name for name in OTHERS if name != "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_an_adapter_comes_back_with_head_labels_and_answers(family: str, task: str, tmp_path: Path) -> None:
    base = tiny_tasks.save_base(tmp_path / "base", family)
    names = {"id2label": {0: "x", 1: "y", 2: "z"}} if TASKS[task].has_labels else {}
    model, tokenizer = load(base, task_type=task, random_state=7, **names)
    heads = facts_of(model).new_modules
    adapted = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=False)
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert type(again.get_base_model()) is type(model)
    assert again.config.id2label == model.config.id2label
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(any(f"{head}." in name for name in trained) for head in heads)
    assert trained == {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert outputs(adapted, tokenizer) == outputs(again, tokenizer)
    # And on PEFT's own: nothing of it needs this library.
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == task
    # Taken once more with the same arguments it is the adapter that it was.
    assert FastLanguageModel.get_peft_model(adapted, r=2, use_gradient_checkpointing=False) is adapted


def shake(model: Any) -> None:
    """Give all that trains other values than those that it started with."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def outputs(model: Any, tokenizer: Any) -> list[Any]:
    batch = tokenizer(["ann has 3 red figs", "bob says the"], padding=True, return_tensors="pt")
    batch = {name: value for name, value in batch.items() if reads(model, name)}
    model.eval()
    with torch.no_grad():
        return [value.tolist() for value in model(**batch).values() if isinstance(value, torch.Tensor)]


def test_a_pooler_that_the_files_lack_is_trained_and_kept(bert: Path, tmp_path: Path) -> None:
    """Else it would be random again, and another, when the adapter is loaded."""
    from safetensors.torch import load_file, save_file

    base = tiny_tasks.save_base(tmp_path / "base")
    weights = {name: w for name, w in load_file(base / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = load(base, task_type="SEQ_CLS", random_state=1)
    assert facts_of(model).new_modules == ("classifier", "pooler")
    adapted = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=False)
    adapted.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter", random_state=2)
    assert outputs(adapted, tokenizer) == outputs(again, tokenizer)


@pytest.mark.parametrize(
    ("family", "task", "targets"),
    [
        ("bert", "SEQ_CLS", {"query", "key", "value", "dense"}),
        ("roberta", "TOKEN_CLS", {"query", "key", "value", "dense"}),
        ("distilbert", "SEQ_CLS", {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}),
        ("t5", "SEQ_2_SEQ_LM", {"q", "k", "v", "o", "wi", "wo"}),
        ("bart", "SEQ_2_SEQ_LM", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ],
)
def test_the_usual_targets_of_each_family(family: str, task: str, targets: set[str], tmp_path: Path) -> None:
    model, _ = load(tiny_tasks.save_base(tmp_path / "base", family), task_type=task)
    adapted = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=False)
    assert set(adapted.peft_config["default"].target_modules) == targets
    with_adapter = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert not [name for name in with_adapter if "classifier" in name or "lm_head" in name]


def test_no_adapter_goes_where_no_loss_comes_through(bert: Path) -> None:
    adapted = FastLanguageModel.get_peft_model(load(bert, task_type="FEATURE_EXTRACTION")[0], r=2)
    assert not [name for name, _ in adapted.named_parameters() if "pooler" in name and "lora" in name]


def test_another_task_than_the_models_is_refused(bert: Path, tmp_path: Path) -> None:
    model, _ = load(bert, task_type="SEQ_CLS")
    with pytest.raises(SettingsError, match="task_type='TOKEN_CLS', but BertForSequenceClassification is a model for"):
        FastLanguageModel.get_peft_model(model, task_type="TOKEN_CLS")
    adapted = FastLanguageModel.get_peft_model(model, r=2, task_type="sequence_classification")
    adapted.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="was trained for SEQ_CLS, not for TOKEN_CLS"):
        load(tmp_path, task_type="TOKEN_CLS")
    with pytest.raises(AdapterError, match="was trained with the labels LABEL_0, LABEL_1"):
        load(tmp_path, task_type="SEQ_CLS", id2label={0: "a", 1: "b"})


@pytest.mark.parametrize("start", ["eva", "loftq"])
def test_starts_that_look_at_rows_or_round_the_base_are_refused(bert: Path, start: str) -> None:
    model, _ = load(bert, task_type="SEQ_CLS")
    with pytest.raises(NotSupportedYetError, match=f"init_lora_weights='{start}' with task_type='SEQ_CLS' is not"):
        FastLanguageModel.get_peft_model(model, r=2, init_lora_weights=start)


def test_a_start_that_takes_out_of_the_base_is_saved_for_the_base_as_it_was(bert: Path, tmp_path: Path) -> None:
    model, tokenizer = load(bert, task_type="SEQ_CLS")
    adapted = FastLanguageModel.get_peft_model(model, r=2, init_lora_weights="pissa", use_gradient_checkpointing=False)
    shake(adapted)
    adapted.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    for ours, theirs in zip(outputs(adapted, tokenizer), outputs(again, tokenizer), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-4)


# ---- causal models with heads ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_causal_model_judges_at_the_last_real_token_with_padding_on_either_side(llama: Path, side: str) -> None:
    model, tokenizer = load(llama, task_type="SEQ_CLS", num_labels=3)
    texts = ["the cat", "a dog saw the red house while rain fell", "rain"]
    model.eval()
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
        batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        together = model(**batch).logits
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_vectors_of_texts_do_not_depend_on_what_stands_beside_them(bert: Path) -> None:
    model, tokenizer = load(bert)
    texts = ["ann has 3 red figs", "bob", "eve buys the black nuts ."]
    together = embed_texts(model, tokenizer, texts)
    alone = torch.cat([embed_texts(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    assert not model.training
    model.train()
    torch.testing.assert_close(embed_texts(model, tokenizer, texts), together)
    assert model.training
