"""What the trainer does beside adding up losses: refuses, stops, keeps the best, accepts the older call style."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.training import support
from transformers import TrainerCallback

from tunesmith import FastLanguageModel, SFTConfig, SFTTrainer, train_on_responses_only
from tunesmith.core.device import DtypeChoice
from tunesmith.core.errors import (
    AdapterError,
    DataError,
    ModelError,
    NotSupportedYetError,
    SettingsError,
    TrainingError,
)
from tunesmith.core.files import damage
from tunesmith.engine.attention import use_document_attention
from tunesmith.engine.install import install
from tunesmith.models.load import ModelFacts
from tunesmith.training.checkpoint import checkpoints_in

# ---- values that are not finite, weights that get no gradient ----


def poisoned_rows(at: int, count: int = 8) -> tuple[list[dict[str, Any]], int]:
    """Rows of which only number ``at`` holds the letter ``#``, and the token id of that letter."""
    rows = tiny.chat_rows(count)
    rows[at] = {"messages": [{"role": "user", "content": "the cat #"}, {"role": "assistant", "content": "sat"}]}
    return rows, tiny.tiny_tokenizer().encode("#", add_special_tokens=False)[0]


def poisoned_trainer(folder: Path, **settings: Any) -> tuple[Any, int]:
    """A trainer whose frozen base turns one row into NaN, and that row's place in the order of training."""
    rows, token = poisoned_rows(5)
    model = support.adapted()
    trainer = support.trainer(
        folder, rows=rows, model=model, **{"per_device_train_batch_size": 1, "save_strategy": "no", **settings}
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    order = [index for batch in trainer.get_train_dataloader().batch_sampler for index in batch]
    return trainer, order.index(5)


def test_a_loss_that_is_nan_stops_the_run_and_names_the_row(tmp_path: Path) -> None:
    trainer, steps = poisoned_trainer(tmp_path)
    assert steps > 0
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert f"the loss is not finite in step {steps + 1}, rows" in message
    assert trainer.train_data.documents[5].where in message
    assert f"The state after step {steps} is kept in {tmp_path / f'checkpoint-{steps}'}" in message
    assert "learning_rate" in message

    kept = checkpoints_in(tmp_path)
    assert [path.name for path in kept] == [f"checkpoint-{steps}"]
    assert damage(kept[0]) is None
    weights = support.trainable(trainer.model)
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_the_state_kept_is_the_one_before_the_bad_row(tmp_path: Path) -> None:
    trainer, steps = poisoned_trainer(tmp_path / "broken")
    with pytest.raises(TrainingError):
        trainer.train()
    good, _ = poisoned_trainer(tmp_path / "good", max_steps=steps, save_strategy="steps", save_steps=1,
                               lr_scheduler_type="constant")  # fmt: skip
    good.train()
    other, _ = poisoned_trainer(tmp_path / "other", lr_scheduler_type="constant")
    with pytest.raises(TrainingError):
        other.train()
    name = f"checkpoint-{steps}/adapter_model.safetensors"
    ours, expected = load_file(tmp_path / "other" / name), load_file(tmp_path / "good" / name)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_in_the_first_step_there_is_nothing_to_keep(tmp_path: Path) -> None:
    trainer, _ = poisoned_trainer(tmp_path, per_device_train_batch_size=8)
    with pytest.raises(TrainingError, match=r"step 1, rows .*: the run stops before it reaches the weights. Look at"):
        trainer.train()
    assert not checkpoints_in(tmp_path)


def test_a_gradient_that_is_nan_stops_the_run(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, rows=8, gradient_accumulation_steps=2)
    weight = next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)
    weight.register_hook(lambda grad: grad * float("inf"))
    before = support.trainable(trainer.model)
    with pytest.raises(TrainingError, match=r"a gradient is not finite in step 1, rows .+") as caught:
        trainer.train()
    # Any micro-batch of the step may have done it, so all rows of the step are candidates.
    assert str(caught.value).count("row") >= 4
    assert all(torch.equal(before[name], w) for name, w in support.trainable(trainer.model).items())


def test_an_adapter_that_the_loss_does_not_reach_is_detected(tmp_path: Path) -> None:
    model = support.adapted()
    layer = model.get_base_model().model.layers[1].mlp
    plain = layer.forward

    def detached(hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return plain(hidden)

    layer.forward = detached
    trainer = support.trainer(tmp_path, rows=8, model=model)
    with pytest.raises(TrainingError, match=r"3 lora_B weights got no gradient in the first step \(for example .*mlp"):
        trainer.train()


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    frozen = tiny.tiny_model("llama").requires_grad_(False)
    with pytest.raises(ModelError, match=r"nothing of this model is trainable. Call FastLanguageModel.get_peft_model"):
        support.trainer(tmp_path, model=frozen)


def test_all_weights_of_a_plain_model_can_train(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    before = support.trainable(model)
    support.trainer(tmp_path, rows=4, model=model, save_strategy="no").train()
    after = support.trainable(model)
    assert not any(torch.equal(before[name], after[name]) for name in before if "layers" in name)


# ---- evaluation, best checkpoint, early stopping ----


class Scripted(TrainerCallback):
    """Sets the eval losses, so that best and stopping do not depend on what a tiny model learns."""

    def __init__(self, trainer: Any, losses: list[float]) -> None:
        self._plain, self._losses = trainer.log, iter(losses)
        trainer.log = self.log

    def log(self, logs: dict[str, float], *more: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_loss"] = next(self._losses)
        self._plain(logs, *more)


def scripted_trainer(folder: Path, losses: list[float], **settings: Any) -> Any:
    trainer = support.trainer(
        folder,
        rows=24,
        eval_dataset=tiny.chat_rows(4, seed=2),
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        **settings,
    )
    Scripted(trainer, losses)
    return trainer


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = scripted_trainer(tmp_path, [0.9, 0.5, 0.7, 0.8, 0.9, 0.6])
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.best_global_step == 2
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    for name, weight in support.trainable(trainer.model).items():
        key = name.replace(".default", "")
        assert torch.equal(weight, best[key])
        assert not torch.equal(weight, last[key])


def test_early_stopping_ends_the_run_at_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = scripted_trainer(tmp_path, [0.9, 0.5, 0.7, 0.8, 0.4, 0.3], early_stopping_patience=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    assert "the eval loss has not fallen for 2 evaluations since step 2 (0.5000)" in caplog.text


def test_overfitting_is_said_during_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        scripted_trainer(tmp_path, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], learning_rate=1e-2).train()
    assert caplog.text.count("Overfitting: since step 1 the eval loss rose from 0.5000") == 1


def test_eval_split_sets_rows_apart(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, rows=40, eval_split=0.25)
    assert len(trainer.eval_data.documents) == 10
    assert len(trainer.train_data.documents) == 30
    texts = [{bytes(d.input_ids) for d in data.documents} for data in (trainer.train_data, trainer.eval_data)]
    assert not texts[0] & texts[1]


def test_evaluation_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there are no evaluation rows"):
        support.trainer(tmp_path).evaluate()
    assert support.trainer(tmp_path).evaluate(tiny.chat_rows(3))["eval_loss"] > 0


@pytest.mark.parametrize(
    "needy",
    [{"early_stopping_patience": 2}, {"load_best_model_at_end": True}, {"save_strategy": "best"},
     {"lr_scheduler_type": "reduce_lr_on_plateau"}, {"lr_scheduler_type": "greedy"}],
)  # fmt: skip
def test_what_follows_evaluations_needs_rows_and_nothing_more(needy: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"{next(iter(needy))}.* needs an evaluation"):
        support.trainer(tmp_path / "none", **needy)
    given = {"eval_dataset": tiny.chat_rows(4, seed=2), "rows": 8, "eval_steps": 1, **needy}
    trainer = support.trainer(tmp_path / "some", **given)
    trainer.train()
    assert trainer.args.load_best_model_at_end is True
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2


def test_the_best_step_needs_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="load_best_model_at_end=True needs checkpoints"):
        support.trainer(tmp_path, eval_dataset=tiny.chat_rows(4), load_best_model_at_end=True, save_strategy="no")


def test_a_best_step_between_two_saves_is_kept_too(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, eval_dataset=tiny.chat_rows(4, seed=2), eval_steps=1, save_steps=6)
    Scripted(trainer, [0.9, 0.5, 0.7, 0.8, 0.9, 0.6])
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    for name, weight in support.trainable(trainer.model).items():
        assert torch.equal(weight, best[name.replace(".default", "")])


def test_the_best_step_is_found_again_where_the_folder_has_moved(tmp_path: Path) -> None:
    losses = [0.9, 0.2, 0.7, 0.8, 0.9, 0.6]
    first = scripted_trainer(tmp_path / "first", losses)
    first.train()
    (tmp_path / "first").rename(tmp_path / "second")
    again = scripted_trainer(tmp_path / "second", losses)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "second" / "checkpoint-2")
    for name, weight in support.trainable(first.model).items():
        assert torch.equal(weight, support.trainable(again.model)[name])


def test_a_best_step_that_is_gone_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scripted_trainer(tmp_path, [0.9, 0.2, 0.7, 0.8, 0.9, 0.6]).train()
    (tmp_path / "checkpoint-2" / "adapter_model.safetensors").unlink()
    again = scripted_trainer(tmp_path, [0.9, 0.2, 0.7, 0.8, 0.9, 0.6])
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert "checkpoint-2, is gone (adapter_model.safetensors is missing)" in caplog.text
    assert again.state.best_global_step is None


def test_evaluation_leaves_the_mode_as_it_was(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, eval_dataset=tiny.chat_rows(4, seed=2))
    for mode in (True, False):
        trainer.model.train(mode)
        trainer.evaluate()
        assert trainer.model.training is mode


# ---- call styles ----


def texts(count: int) -> list[dict[str, str]]:
    tokenizer = tiny.tiny_tokenizer()
    return [{"body": tokenizer.apply_chat_template(row["messages"], tokenize=False)} for row in tiny.chat_rows(count)]


def test_the_older_call_style_is_the_same_as_the_newer(tmp_path: Path) -> None:
    older = SFTTrainer(
        model=support.adapted(),
        tokenizer=tiny.tiny_tokenizer(),
        train_dataset=texts(12),
        dataset_text_field="body",
        max_seq_length=256,
        packing=True,
        args=SFTConfig(output_dir=str(tmp_path / "a"), use_cpu=True),
    )
    newer = SFTTrainer(
        model=support.adapted(),
        processing_class=tiny.tiny_tokenizer(),
        train_dataset=texts(12),
        args=SFTConfig(
            output_dir=str(tmp_path / "b"), dataset_text_field="body", max_length=256, packing=True, use_cpu=True
        ),
    )
    assert older.train_data.fingerprint() == newer.train_data.fingerprint()
    assert len(older.train_dataset) == len(newer.train_dataset) < 12
    assert older.args.max_length == 256


def test_formatting_func_makes_the_text(tmp_path: Path) -> None:
    rows = [{"q": "the cat", "a": "sat"}, {"q": "the dog", "a": "saw"}]

    def one(row: Any) -> str:
        return f"{row['q']} {row['a']}"

    def several(row: Any) -> list[str]:
        return [one(row), row["q"]]

    tokenizer = tiny.tiny_tokenizer()
    first = support.trainer(tmp_path, rows=rows, formatting_func=one)
    assert [tokenizer.decode(d.input_ids) for d in first.train_data.documents] == [
        "the cat sat<|im_end|>", "the dog saw<|im_end|>"
    ]  # fmt: skip
    assert len(support.trainer(tmp_path, rows=rows, formatting_func=several).train_data.documents) == 4
    named = support.trainer(tmp_path, rows=rows, formatting_func=one, dataset_text_field="body")
    assert named.train_data.fingerprint() == first.train_data.fingerprint()
    with pytest.raises(SettingsError, match="formatting_func makes the text of a row, mapping names its columns"):
        support.trainer(tmp_path, rows=rows, formatting_func=one, mapping={"q": "user", "a": "assistant"})


def test_noise_changes_training_and_not_evaluation(tmp_path: Path) -> None:
    losses, evals = [], []
    for alpha in (None, 5.0):
        trainer = support.trainer(
            tmp_path / str(alpha),
            rows=8,
            eval_dataset=tiny.chat_rows(4, seed=1),
            neftune_noise_alpha=alpha,
            save_strategy="no",
        )
        evals.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    assert evals[0] == evals[1]
    assert losses[0] != losses[1]


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_length": 600}, SettingsError, "max_length=600 is above the 512 tokens that the model was loaded with"),
        ({"bf16": True}, SettingsError, "bf16=True, but the model's weights are float32"),
        ({"dataloader_drop_last": True}, NotSupportedYetError, "dataloader_drop_last=True is not supported yet"),
        ({"torch_compile": True}, NotSupportedYetError, "torch_compile=True is not supported yet"),
        ({"fsdp": "full_shard"}, NotSupportedYetError, "fsdp='full_shard' is not supported yet"),
        ({"eval_strategy": "epoch"}, NotSupportedYetError, "eval_strategy='epoch' is not supported yet"),
        ({"metric_for_best_model": "accuracy"}, NotSupportedYetError, "lowest eval loss"),
        ({"average_tokens_across_devices": False}, NotSupportedYetError, "losses count tokens"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, SettingsError, "constant has no warmup"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, SettingsError, "cosine_with_min_lr cannot be used as it is"),
        ({"report_to": "wandb"}, SettingsError, "report_to: wandb is not installed"),
        ({"optim": "galore_adamw"}, SettingsError, "optim=galore_adamw cannot be used here"),
        ({"optim": "paged_ademamix_32bit"}, SettingsError, "its pages need a GPU. Take ademamix, which has none"),
        ({"max_length": 64, "max_seq_length": 32}, SettingsError, "max_length and max_seq_length are the same setting"),
        (
            {"eval_strategy": "steps", "eval_split": 0},
            SettingsError,
            "eval_strategy needs an evaluation, and no row is",
        ),
        (
            {"load_best_model_at_end": True, "eval_split": 0},
            SettingsError,
            "load_best_model_at_end needs an evaluation",
        ),
        (
            {"load_best_model_at_end": True, "save_strategy": "no", "eval_split": 0.5},
            SettingsError,
            "needs checkpoints",
        ),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, SettingsError, "warmup_ratio and warmup_steps both set the warmup"),
        ({"warmup_ratio": 1.5}, SettingsError, "warmup_ratio = 1.5: input should be less than 1"),
    ],
)
def test_settings_that_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        support.trainer(tmp_path, **settings)


def test_arguments_that_are_missing_or_doubled(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    tokenizer, rows = tiny.tiny_tokenizer(), tiny.chat_rows(4)
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, max_length=100)
    with pytest.raises(SettingsError, match="train_dataset is missing"):
        SFTTrainer(support.adapted(), args, processing_class=tokenizer)
    with pytest.raises(ModelError, match="the tokenizer is missing"):
        SFTTrainer(support.adapted(), args, rows)
    with pytest.raises(SettingsError, match="processing_class and tokenizer are the same argument"):
        SFTTrainer(support.adapted(), args, rows, processing_class=tokenizer, tokenizer=object())
    with pytest.raises(SettingsError, match="args is a TrainingArguments; an SFTConfig of tunesmith is needed"):
        SFTTrainer(support.adapted(), TrainingArguments(output_dir=str(tmp_path)), rows, processing_class=tokenizer)
    with pytest.raises(SettingsError, match="max_length=50 is given to the trainer and 100 in args"):
        SFTTrainer(support.adapted(), args, rows, processing_class=tokenizer, max_seq_length=50)


def test_a_model_that_got_another_layer_trains(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    use_document_attention(model)
    install(model)
    layers = model.model.layers
    layers.append(copy.deepcopy(layers[1]))
    layers[2].self_attn.layer_idx, model.config.num_hidden_layers = 2, 3
    model.tunesmith_facts = ModelFacts("tiny", DtypeChoice(torch.float32, "a test"), tiny.WINDOW)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    before = support.trainable(model)
    support.trainer(tmp_path, model=model, max_steps=1).train()
    after = {name: weight for name, weight in support.trainable(model).items() if "lora_B" in name}
    assert not any(torch.equal(before[name], weight) for name, weight in after.items())


def test_logits_of_every_token_are_not_made(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="logits of every token, which are never made here"):
        support.trainer(tmp_path).predict(tiny.chat_rows(2))


def test_rows_that_train_nothing_are_refused(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    with pytest.raises(DataError):
        support.trainer(tmp_path, rows=rows)


@pytest.mark.parametrize("rows", [None, 4])
def test_no_evaluation_where_none_was_asked_for(rows: int | None, tmp_path: Path) -> None:
    given = None if rows is None else tiny.chat_rows(rows, seed=2)
    trainer = support.trainer(tmp_path, rows=24, eval_dataset=given, eval_strategy="no", eval_split=0.5, max_steps=2)
    assert len(trainer.train_data.documents) == 24  # none is held back
    trainer.train()
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)
    if rows:
        assert "eval_loss" in trainer.evaluate()
    with pytest.raises(SettingsError, match="early_stopping_patience needs an evaluation"):
        support.trainer(tmp_path, eval_dataset=given, eval_strategy="no", early_stopping_patience=2)


@pytest.mark.parametrize("schedule", ["warmup_stable_decay", "cosine", "constant"])
def test_schedules_run_as_they_are(schedule: str, tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, rows=80, lr_scheduler_type=schedule, save_strategy="no")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(rates) == pytest.approx(1e-2)
    assert (rates[-1] < max(rates)) == (schedule != "constant")


def test_python_and_command_line_have_the_same_defaults() -> None:
    from tunesmith.data.settings import DataSettings
    from tunesmith.training.settings import TrainingSettings

    config = SFTConfig(output_dir="runs/x", use_cpu=True)
    for kind in (TrainingSettings, DataSettings):
        for name, entry in kind.model_fields.items():
            if hasattr(config, name) and name not in ("output_dir", "report_to", "per_device_eval_batch_size"):
                own = getattr(config, name)
                if name in ("max_steps", "eval_steps", "save_steps", "warmup_steps"):
                    continue  # transformers writes "not given" differently; the next lines check what it means.
                assert getattr(own, "value", own) == entry.default, name
    assert (config.max_steps, config.eval_steps, config.save_steps) == (-1, None, 0)
    assert config.get_warmup_steps(100) == 5


def test_answers_only_never_widens_a_mask(tmp_path: Path) -> None:

    rows = tiny.chat_rows(8)
    for row in rows:
        row["messages"] = [*row["messages"], *row["messages"]]
        first = next(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
        row["messages"][first] = {**row["messages"][first], "train": False}
        row["messages"] = [m for i, m in enumerate(row["messages"]) if m["role"] != "system" or i == 0]
    trainer = support.trainer(tmp_path, rows=rows)
    before = [document.trained.copy() for document in trainer.train_data.documents]
    train_on_responses_only(trainer)
    for old, document in zip(before, trainer.train_data.documents, strict=True):
        assert (old == document.trained).all()


def test_warmup_ratio_reaches_transformers(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, rows=40, warmup_ratio=0.5, save_strategy="no")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates.index(max(rates)) == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_bias", True), ("alora_invocation_tokens", [5, 6]), ("layer_replication", [(0, 2), (1, 2)])],
)
def test_an_adapter_that_could_never_be_merged_is_not_trained(name: str, value: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **{name: value})
    with pytest.raises(AdapterError, match=f"has {name}, which no plain weight can hold"):
        support.trainer(tmp_path, model=get_peft_model(tiny.tiny_model("qwen2"), config))


def test_an_eval_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = support.trainer(tmp_path, rows=24, eval_split=0.2, eval_steps=1, max_steps=3)
    loss = trainer.head.loss

    def broken(batch: Any, divisor: Any) -> Any:
        return loss(batch, divisor) * (1.0 if trainer.model.training else float("nan"))

    monkeypatch.setattr(trainer.head, "loss", broken)
    with pytest.raises(TrainingError, match="the eval loss is not finite in step"):
        trainer.train()
