"""Training for tasks: batches, losses, scores, the trainer's guarantees, and that tiny models learn from scratch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from tests import tiny, tiny_tasks
from transformers import TrainerCallback

from tunesmith import FastLanguageModel, SFTConfig, TaskTrainer
from tunesmith.core.errors import CheckpointError, ModelError, OutputError, SettingsError, TrainingError
from tunesmith.core.tasks import TASKS
from tunesmith.training.tasks.recipes import recipe_for
from tunesmith.training.tasks.scores import macro_f1, span_f1, tag_spans, text_f1
from tunesmith.training.tasks.trainer import score_rows

OTHERS = [name for name in TASKS if name != "CAUSAL_LM"]
_TIMES = ("runtime", "_per_second", "tokens_per_s", "peak_bytes", "total_flos")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_tasks.save_base(folder / family, family) for family in ("bert", "t5", "bart")}


def load(bases: dict[str, Path], task: str, *, family: str = "", adapter: bool = True, **arguments: Any) -> Any:
    """Return a model for ``task`` without dropout, so that batches can be compared, and the tokenizer."""
    labels = {"id2label": dict(enumerate(tiny_tasks.LABELS[task]))} if TASKS[task].has_labels else {}
    base = bases[family or tiny_tasks.FAMILY_OF.get(task, "bert")]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), task_type=task, dtype="float32", use_gradient_checkpointing=False, full_finetuning=not adapter,
        **labels, **arguments,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    if adapter:
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    return model, tokenizer


def trainer(folder: Path, model: Any, tokenizer: Any, task: str, *, rows: Any = 24, **settings: Any) -> TaskTrainer:
    own = {name: settings.pop(name) for name in ("eval_dataset", "mapping", "callbacks") if name in settings}
    args = SFTConfig(
        output_dir=str(folder),
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "use_cpu": True,
           "disable_tqdm": True, "eval_split": 0, **settings},
    )  # fmt: skip
    rows = tiny_tasks.ROWS[task](rows) if isinstance(rows, int) else rows
    return TaskTrainer(model, args, rows, processing_class=tokenizer, **own)


class StopAt(TrainerCallback):
    """A crash after a step: nothing is saved on the way out."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            raise RuntimeError("a crash")
        return control


# ---- batches and losses ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_the_right_whatever_the_tokenizer_says(bases: Any, tmp_path: Path, side: str) -> None:
    model, tokenizer = load(bases, "SEQ_CLS")
    made = trainer(tmp_path, model, tokenizer, "SEQ_CLS")
    made.recipe.tokenizer.padding_side = side
    rows = sorted(made.train_data.rows, key=lambda row: len(row.features["input_ids"]))[:: len(made.train_data) - 1]
    batch = made.recipe.collate(rows)
    tokenizer.padding_side = "right"
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], rows, strict=True):
        length = len(row.features["input_ids"])
        assert ids[:length].tolist() == row.features["input_ids"]
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)


@pytest.mark.parametrize(("task", "family"), [(task, "") for task in OTHERS] + [("SEQ_2_SEQ_LM", "bart")])
def test_a_step_is_the_same_however_it_is_split(bases: Any, tmp_path: Path, task: str, family: str) -> None:
    """8 rows at once, 4 x 2 and 1 x 8: equal losses and weights. In-batch negatives are those of a micro-batch."""
    losses, weights = [], []
    sizes = [(8, 1)] if task == "FEATURE_EXTRACTION" else [(8, 1), (4, 2), (1, 8)]
    for size, steps in [*sizes, (8, 1)]:
        model, tokenizer = load(bases, task, family=family)
        folder = tmp_path / f"{len(losses)}"
        made = trainer(folder, model, tokenizer, task, rows=8, per_device_train_batch_size=size, optim="sgd",
                       gradient_accumulation_steps=steps, max_steps=1, save_strategy="no")  # fmt: skip
        made.train()
        losses.append(made.state.log_history[0]["loss"])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(losses[:1] * len(losses)), rtol=1e-5, atol=1e-6)
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM"])
def test_the_loss_is_that_of_transformers(bases: Any, tmp_path: Path, task: str) -> None:
    model, tokenizer = load(bases, task)
    made = trainer(tmp_path, model, tokenizer, task)
    batch = made.recipe.collate(made.train_data.rows[:5])
    model.eval()
    with torch.no_grad():
        theirs = model(**batch).loss
        ours = made.recipe.loss(model, batch)[0] / made.recipe.items(batch)
    torch.testing.assert_close(ours, theirs)


def test_the_loss_of_answers_is_that_of_transformers_without_padding(bases: Any, tmp_path: Path) -> None:
    model, tokenizer = load(bases, "QUESTION_ANS")
    made = trainer(tmp_path, model, tokenizer, "QUESTION_ANS")
    batch = made.recipe.collate(made.train_data.rows[:1])
    model.eval()
    with torch.no_grad():
        first, last = batch["labels"].unbind(1)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        theirs = model(**inputs, start_positions=first, end_positions=last).loss
        ours = made.recipe.loss(model, batch)[0] / made.recipe.items(batch)
        together = made.recipe.collate(made.train_data.rows[:3])
        apart = [made.recipe.collate([row]) for row in made.train_data.rows[:3]]
        one = made.recipe.loss(model, together)[0]
        many = sum(made.recipe.loss(model, single)[0] for single in apart)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(one, many)


# ---- scores ----


def test_spans_of_tags() -> None:
    assert tag_spans(["B-A", "I-A", "O", "I-B", "B-B", "I-A"]) == {(0, 2, "A"), (3, 4, "B"), (4, 5, "B"), (5, 6, "A")}
    assert tag_spans(["O", "O"]) == set()
    right = [["B-A", "I-A", "O"], ["B-B", "O", "O"]]
    assert span_f1(right, right) == 1
    assert span_f1(right, [["B-A", "O", "O"], ["B-B", "O", "O"]]) == 0.5
    assert span_f1(right, [["O"] * 3] * 2) == 0


def test_spans_of_tags_that_mark_their_ends() -> None:
    """BIOES and BILOU: a span of one word, and neighbours of one kind."""
    assert tag_spans(["S-A", "S-A", "O", "B-A", "I-A", "E-A"]) == {(0, 1, "A"), (1, 2, "A"), (3, 6, "A")}
    assert tag_spans(["U-A", "B-B", "L-B", "I-B", "O"]) == {(0, 1, "A"), (1, 3, "B"), (3, 4, "B")}
    assert tag_spans(["E-A", "E-A", "B-A", "S-A"]) == {(0, 1, "A"), (1, 2, "A"), (2, 3, "A"), (3, 4, "A")}
    right = [["S-A", "O", "B-B", "E-B"]]
    assert span_f1(right, [["O", "S-A", "B-B", "E-B"]]) == 0.5
    assert span_f1([["B-B", "I-B", "E-B", "O"]], [["B-B", "I-B", "O", "O"]]) == 0


def test_tags_that_mark_no_spans_are_scored_as_labels(bases: Any) -> None:
    model, tokenizer = load(bases, "TOKEN_CLS")
    recipe = recipe_for(model, tokenizer)
    for labels, figure in (
        (("B-A", "I-A", "O"), "span_f1"), (("B-A", "L-A", "U-B", "O"), "span_f1"), (("B-A", "X", "O"), "macro_f1"),
        (("B", "I", "O"), "macro_f1"), (("NOUN", "VERB"), "macro_f1"),
    ):  # fmt: skip
        recipe.labels = labels
        assert list(recipe.score([], [])) == ["accuracy", figure]


def test_macro_f1_counts_labels_alike() -> None:
    assert macro_f1([0, 0, 0, 1], [0, 0, 0, 0]) == pytest.approx((6 / 7) / 2)
    assert macro_f1([0, 1], [0, 1]) == 1
    # A label that is only guessed has no F1 of its own, and costs the right one.
    assert macro_f1([0, 0], [0, 2]) == pytest.approx(2 / 3)


def test_text_f1_counts_words() -> None:
    assert text_f1("3 red figs", "3 red figs") == 1
    assert text_f1("red figs", "3 red figs") == pytest.approx(0.8)
    assert (text_f1("", ""), text_f1("", "a"), text_f1("b", "a")) == (1, 0, 0)


def test_a_span_is_read_back_as_text(bases: Any, tmp_path: Path) -> None:
    model, tokenizer = load(bases, "QUESTION_ANS")
    rows = [
        *tiny_tasks.question_rows(8),
        {"question": "a", "context": "ann", "answers": {"text": [], "answer_start": []}},
    ]
    made = trainer(tmp_path, model, tokenizer, "QUESTION_ANS", rows=rows)
    rows_in = made.train_data.rows
    sure = []
    for row in rows_in:
        logits = torch.zeros(2, len(row.features["input_ids"]) + 3)
        logits[0, row.features["labels"][0]] = logits[1, row.features["labels"][1]] = 5
        logits[0, -1] = logits[1, -1] = 9  # padding is no answer
        sure.append(logits)
    answers = made.recipe.answers(rows_in, sure)
    assert answers == [row["answer"] for row in rows[:-1]] + [""]
    assert made.recipe.score(rows_in, answers) == {"exact_match": 1, "f1": 1}
    unsure = made.recipe.answers(rows_in, [torch.zeros_like(logits) for logits in sure])
    assert made.recipe.score(rows_in, unsure)["exact_match"] < 0.5


# ---- the trainer ----


@pytest.mark.parametrize("task", OTHERS)
def test_each_task_trains_an_adapter_saves_it_and_scores_it(bases: Any, tmp_path: Path, task: str) -> None:
    model, tokenizer = load(bases, task)
    made = trainer(tmp_path, model, tokenizer, task, rows=40, eval_split=0.2, max_steps=6, eval_steps=3)
    made.train()
    figures = made.evaluate()
    assert f"eval_{made.recipe.best}" in figures
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all("tokens_per_s" in line and "peak_bytes" in line for line in lines if "loss" in line)
    assert [line["step"] for line in lines if f"eval_{made.recipe.best}" in line] == [3, 6, 6]
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, other_tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), dtype="float32")
    fresh = trainer(tmp_path / "again", again, other_tokenizer, task, rows=40, eval_split=0.2)
    score = fresh.evaluate()
    told = [name for name in figures if name not in ("eval_runtime", "epoch")]
    assert len(told) >= 2
    assert {name: score[name] for name in told} == {name: figures[name] for name in told}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_causal_model_with_a_head_trains_and_comes_back(tmp_path: Path, task: str) -> None:
    tiny.save_model(tmp_path / "llama")
    bases = {"llama": tmp_path / "llama"}
    model, tokenizer = load(bases, task, family="llama")
    made = trainer(tmp_path / "run", model, tokenizer, task, rows=40, eval_split=0.2, max_steps=4)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), dtype="float32")
    other = trainer(tmp_path / "again", again, tokenizer, task, rows=40, eval_split=0.2)
    assert other.evaluate()["eval_loss"] == made.evaluate()["eval_loss"]


def test_all_weights_train_and_come_back(bases: Any, tmp_path: Path) -> None:
    model, tokenizer = load(bases, "SEQ_CLS", adapter=False)
    model.config.problem_type = "multi_label_classification"  # of what it was trained for before
    made = trainer(tmp_path, model, tokenizer, "SEQ_CLS", rows=200, num_train_epochs=4, learning_rate=5e-3)
    made.train()
    score = made.evaluate(tiny_tasks.colour_rows(50, seed=9))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "model"), dtype="float32")
    assert again.config.label2id == {"cold": 0, "warm": 1}
    assert again.config.problem_type == "single_label_classification"
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert score["eval_accuracy"] > 0.8


def test_a_resumed_run_equals_one_without_a_break(bases: Any, tmp_path: Path, caplog: Any) -> None:
    def run(folder: str, steps: int, resume: bool = False, dropout: float = 0.1) -> dict[str, torch.Tensor]:
        model, tokenizer = load(bases, "SEQ_CLS")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        made = trainer(tmp_path / folder, model, tokenizer, "SEQ_CLS", max_steps=9, save_steps=3, eval_split=0.2,
                       callbacks=[StopAt(steps)])  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    straight = run("straight", 0)
    with pytest.raises(RuntimeError, match="a crash"):
        run("broken", 4)
    with caplog.at_level(logging.INFO, logger="tunesmith"):
        resumed = run("broken", 0, resume=True)
    assert any("Resuming from" in message and "checkpoint-3" in message for message in caplog.messages)
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())
    lines = [metrics(tmp_path / folder) for folder in ("straight", "broken")]
    assert lines[0] == lines[1]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not any(time in key for time in _TIMES)}
        for line in lines
        if "train_runtime" not in line
    ]


def test_another_runs_checkpoints_are_neither_used_nor_overwritten(bases: Any, tmp_path: Path) -> None:
    model, tokenizer = load(bases, "SEQ_CLS")
    trainer(tmp_path, model, tokenizer, "SEQ_CLS", max_steps=2, save_steps=1).train()
    model, tokenizer = load(bases, "SEQ_CLS")
    with pytest.raises(OutputError, match="already holds checkpoints of a run"):
        trainer(tmp_path, model, tokenizer, "SEQ_CLS", max_steps=2, save_steps=1).train()
    with pytest.raises(CheckpointError, match="belongs to another run: data train"):
        trainer(tmp_path, model, tokenizer, "SEQ_CLS", rows=30, max_steps=2, save_steps=1).train(True)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(bases: Any, tmp_path: Path) -> None:
    model, tokenizer = load(bases, "SEQ_CLS")
    made = trainer(tmp_path, model, tokenizer, "SEQ_CLS", max_steps=4)
    model.get_base_model().classifier.modules_to_save["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="the loss is not finite in step 1"):
        made.train()


def test_an_adapter_that_no_loss_reaches_is_said(bases: Any, tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(bases["bert"]), task_type="FEATURE_EXTRACTION")
    model = FastLanguageModel.get_peft_model(
        model, r=2, target_modules=["query", "pooler.dense"], exclude_modules=["key"], use_gradient_checkpointing=False
    )
    with pytest.raises(TrainingError, match=r"1 lora_B weights got no gradient .*pooler"):
        trainer(tmp_path, model, tokenizer, "FEATURE_EXTRACTION", max_steps=1).train()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"packing": True}, SettingsError, "packing: without effect on QUESTION_ANS"),
        ({"train_on": "all"}, SettingsError, "train_on: without effect on QUESTION_ANS"),
        ({"dataset_text_field": "x"}, SettingsError, "dataset_text_field: without effect"),
        ({"label_smoothing_factor": 0.1}, SettingsError, "label_smoothing_factor: without effect"),
        ({"rows": None}, SettingsError, "train_dataset is missing"),
        ({"max_length": 900}, SettingsError, "max_length=900 is above the 512 tokens"),
        ({"mapping": {"a": "b"}}, Exception, "makes 'a' the 'b', which QUESTION_ANS does not have"),
        ({"embedding_learning_rate": 1e-3}, None, ""),
    ],
)
def test_what_does_not_fit_a_task_is_refused(
    bases: Any, tmp_path: Path, settings: Any, error: Any, message: str
) -> None:
    model, tokenizer = load(bases, "QUESTION_ANS")
    if error is None:
        made = trainer(tmp_path, model, tokenizer, "QUESTION_ANS", **settings)
        with pytest.raises(SettingsError, match="embedding_learning_rate has no effect"):
            made.train()
        return
    with pytest.raises(error, match=message):
        trainer(tmp_path, model, tokenizer, "QUESTION_ANS", **settings)


def test_predictions_are_refused_with_what_gives_answers(bases: Any, tmp_path: Path) -> None:
    model, tokenizer = load(bases, "SEQ_CLS")
    made = trainer(tmp_path, model, tokenizer, "SEQ_CLS", rows=8)
    with pytest.raises(SettingsError, match=r"trainer.evaluate\(rows\) gives the figures; score_rows\("):
        made.predict(made.train_data)
    assert len(score_rows(made.model, made.recipe, made.train_data.rows, batch_size=8)[1]) == 8


def test_models_that_cannot_train_a_task(bases: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny_tasks.tokenizer()
    with pytest.raises(ModelError, match="is a model for CAUSAL_LM, which SFTTrainer trains"):
        TaskTrainer(tiny.tiny_model("llama"), SFTConfig(output_dir=str(tmp_path)), [{}], processing_class=tokenizer)
    model, _ = load(bases, "SEQ_CLS")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match="the tokenizer has no padding token"):
        TaskTrainer(model, SFTConfig(output_dir=str(tmp_path)), [{}], processing_class=bare)
    base, tokenizer = FastLanguageModel.from_pretrained(str(bases["bert"]), task_type="SEQ_CLS")
    with pytest.raises(ModelError, match="the model has no adapter: call FastLanguageModel"):
        TaskTrainer(base, SFTConfig(output_dir=str(tmp_path)), tiny_tasks.colour_rows(9), processing_class=tokenizer)
    model, tokenizer = load(bases, "SEQ_CLS")
    model.config.id2label = {0: "how much"}
    with pytest.raises(ModelError, match=r"has one label .a head for one number."):
        recipe_for(model, tokenizer)
    model, tokenizer = load(bases, "SEQ_2_SEQ_LM")
    model.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="has no decoder_start_token_id"):
        recipe_for(model, tokenizer)


def test_a_stream_is_read_as_far_as_the_run_goes(bases: dict[str, Path], tmp_path: Path) -> None:
    def endless() -> Any:
        while True:
            yield from tiny_tasks.ROWS["SEQ_CLS"](8)

    rows = IterableDataset.from_generator(endless)
    assert trainer(tmp_path, *load(bases, "SEQ_CLS"), "SEQ_CLS", rows=rows, max_steps=2).ledger.rows_in == 8


def test_rows_that_are_held_out_are_said(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, *load(bases, "SEQ_CLS"), "SEQ_CLS", rows=40, eval_split=0.1)
    assert "rows are held out to evaluate on; eval_split=0 trains on all" in caplog.text
