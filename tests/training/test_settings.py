from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.training import support

from tunesmith import SFTTrainer
from tunesmith.core.errors import NotSupportedYetError, SettingsError
from tunesmith.training.aliases import ALIASES, translate
from tunesmith.training.checkpoint import checkpoints_in
from tunesmith.training.config import SFTConfig, config_of
from tunesmith.training.settings import _NOT_YET, LORA_RATE, RunSettings, load_run_settings

GIVEN = {"model": "m", "data": "d"}


def load(**values: Any) -> RunSettings:
    return load_run_settings(None, {**GIVEN, **values})[0]


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\nlerning_rate: 1e-4\nr: many\nlora_dropout: 2\npacking: 3\nreport_to: paper\nseed: -1\n",
        encoding="utf-8",
    )
    with pytest.raises(SettingsError) as caught:
        load_run_settings(file, {})
    message = str(caught.value)
    assert message.startswith(f"{file}: 7 problems\n")
    for part in (
        "unknown key 'lerning_rate'. Did you mean 'learning_rate'?",
        "r = 'many': a whole number is needed",
        "lora_dropout = 2: ",
        "packing = 3: true or false is needed",
        "report_to = 'paper': ",
        "seed = -1: ",
        "data is missing: Training rows",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": True}, "r = True: True is a truth value, a number is needed"),
        ({"learning_rate": True}, "learning_rate = True"),
        ({"max_steps": False}, "max_steps = False"),
        ({"r": 1.5}, "r = 1.5: input should be a valid integer, got a number with a fractional part"),
        ({"r": 0}, "r = 0: "),
        ({"learning_rate": 0}, "learning_rate = 0: "),
        ({"learning_rate": 1}, "learning_rate = 1: "),
        ({"train_on": "answers"}, "train_on = 'answers': .*'assistant', 'all' or 'last'"),
        ({"map": ["a"]}, "map = .*a mapping or nothing is needed"),
        ({"target_modules": 7}, "target_modules = 7: a list or a text or nothing is needed"),
        ({"eval_split": 1.0}, "eval_split = 1.0: "),
        ({"batch": 3}, "unknown key 'batch'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_ratio and warmup_steps both set the warmup"),
        ({"early_stopping_patience": 2, "eval_split": 0}, "early_stopping_patience needs an evaluation"),
        ({"max_length": 512, "max_seq_length": 256}, "max_length=512 is above max_seq_length=256"),
        ({"finetune_last_n_layers": 2, "layers_to_transform": [1]}, "both choose layers"),
    ],
)
def test_settings_that_exclude_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(**values)


# How other tools write what we call so: (their key, their value, our key, our value).
ROWS = [
    ("base_model", "m", "model", "m"),
    ("model_name_or_path", "m", "model", "m"),
    ("dataset", "d", "data", "d"),
    ("datasets", [{"path": "d", "type": "alpaca"}], "data", "d"),
    ("dataset_name", "d", "data", "d"),
    ("local_dataset", "d", "data", "d"),
    ("sequence_len", 128, "max_length", 128),
    ("cutoff_len", 128, "max_length", 128),
    ("micro_batch_size", 3, "per_device_train_batch_size", 3),
    ("batch_size", 3, "per_device_train_batch_size", 3),
    ("grad_accumulation_steps", 3, "gradient_accumulation_steps", 3),
    ("num_epochs", 3, "num_train_epochs", 3),
    ("epochs", 3, "num_train_epochs", 3),
    ("iters", 30, "max_steps", 30),
    ("lr", 1e-3, "learning_rate", 1e-3),
    ("lr_scheduler", "cosine", "lr_scheduler_type", "cosine"),
    ("lr_scheduler_type", "wsd", "lr_scheduler_type", "warmup_stable_decay"),
    ("num_warmup_steps", 5, "warmup_steps", 5),
    ("lora_r", 4, "r", 4),
    ("lora_rank", 4, "r", 4),
    ("rank", 4, "r", 4),
    ("lora_target_modules", ["q_proj"], "target_modules", ["q_proj"]),
    ("lora_target_modules", "q_proj, v_proj", "target_modules", ["q_proj", "v_proj"]),
    ("lora_target", "all", "target_modules", "all-linear"),
    ("lora_target_linear", True, "target_modules", "all-linear"),
    ("train_on_inputs", False, "train_on", "assistant"),
    ("train_on_inputs", True, "train_on", "all"),
    ("train_on_prompt", False, "train_on", "assistant"),
    ("train_on_input", True, "train_on", "all"),
    ("assistant_only_loss", True, "train_on", "assistant"),
    ("completion_only_loss", False, "train_on", "all"),
    ("train_on_completions", True, "train_on", "assistant"),
    ("mask_prompt", True, "train_on", "assistant"),
    ("mask_history", True, "train_on", "last"),
    ("sample_packing", True, "packing", True),
    ("val_set_size", 0.1, "eval_split", 0.1),
    ("val_size", 0.1, "eval_split", 0.1),
    ("test_split_size", 0.1, "eval_split", 0.1),
    ("dataset_val", "v", "eval_data", "v"),
    ("adapter_path", "out", "output_dir", "out"),
    ("optimizer", "lion", "optim", "lion_32bit"),
    ("gradient_checkpointing", False, "use_gradient_checkpointing", False),
]


@pytest.mark.parametrize(("key", "value", "ours", "meant"), ROWS, ids=[f"{row[0]}={row[1]}" for row in ROWS])
def test_keys_of_other_tools_are_translated_and_listed(key: str, value: Any, ours: str, meant: Any) -> None:
    rest = {name: text for name, text in GIVEN.items() if name != ours}
    settings, used = load_run_settings(None, {**rest, key: value})
    assert getattr(settings, ours) == meant
    assert used == [f"{key}: {value} is read as {ours}: {meant}"]


def test_every_alias_leads_to_a_setting() -> None:
    assert set(ALIASES.values()) <= set(RunSettings.model_fields)
    assert not set(ALIASES) & set(RunSettings.model_fields)


def test_our_own_keys_are_not_listed() -> None:
    values = {**GIVEN, "r": 8, "learning_rate": 1e-4, "target_modules": ["q_proj"], "optim": "sgd", "train_on": "all"}
    assert translate(values, {}) == (values, [])


@pytest.mark.parametrize("pair", [("lora_r", "rank"), ("lora_r", "r"), ("sequence_len", "max_length"),
                                  ("train_on_inputs", "mask_prompt")])  # fmt: skip
def test_one_setting_under_two_names_is_refused(pair: tuple[str, str]) -> None:
    value = "r" not in pair and pair[0] == "train_on_inputs"
    with pytest.raises(SettingsError, match=f"{pair[0]} and {pair[1]} are the same setting .* Give one of them"):
        load(**dict.fromkeys(pair, value or 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_on_inputs": "no"}, "train_on_inputs = 'no': true or false is needed"),
        ({"lora_target_linear": False}, "names no layers"),
        ({"datasets": [{"path": "a"}, {"path": "b"}]}, "2 data sets; one is read here"),
        ({"datasets": [{"path": "a", "field": "x"}]}, "'field' of a data set has no counterpart"),
    ],
)
def test_values_without_a_counterpart_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_run_settings(None, {"model": "m", **values})


@pytest.mark.parametrize("name", _NOT_YET)
def test_what_is_not_written_yet_is_refused_and_never_ignored(name: str) -> None:
    with pytest.raises(NotSupportedYetError, match=f"{name}=.* is not supported yet"):
        load(**{name: "something"})
    # An option that is off asks for nothing.
    assert load(**{name: False}).model_dump() == load().model_dump()


@pytest.mark.parametrize(
    ("asked", "config"),
    [({"loftq_config": {"loftq_bits": "2"}}, {"loftq_bits": 2, "loftq_iter": 1}),
     ({"init_lora_weights": "loftq"}, {"loftq_bits": 4, "loftq_iter": 1}),
     ({"loftq_config": {}}, None)],
)  # fmt: skip
def test_a_config_of_loftq_sets_the_start(asked: dict[str, Any], config: dict[str, int] | None) -> None:
    settings = load(**asked)
    assert settings.loftq_config == config
    assert settings.init_lora_weights == (True if config is None else "loftq")


def test_flags_replace_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nlora_r: 8\nwarmup_steps: 5\n", encoding="utf-8")
    settings, used = load_run_settings(file, {"r": 4, "warmup_ratio": 0.2})
    assert (settings.r, settings.warmup_ratio, settings.warmup_steps) == (4, 0.2, None)
    assert used == ["lora_r: 8 is read as r: 8"]


def test_resolved_settings_read_back_are_the_same(tmp_path: Path) -> None:
    import yaml

    settings = load(r=4, target_modules=["q_proj"], report_to=["tensorboard"], map={"a": "user"})
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump()), encoding="utf-8")
    assert load_run_settings(file, {})[0] == settings


def test_every_training_setting_reaches_the_trainer(tmp_path: Path) -> None:
    """No option without effect: each field, set to another value, changes the arguments of the trainer."""
    from tunesmith.training.settings import TrainingSettings

    other: dict[str, Any] = {
        "num_train_epochs": 2.0, "max_steps": 7, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
        "embedding_learning_rate": 1e-5,
        "warmup_ratio": 0.2, "warmup_steps": 4, "weight_decay": 0.2, "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 5, "max_length": 77, "optim": "sgd",
        "max_grad_norm": 0.5, "neftune_noise_alpha": 5.0, "seed": 1, "logging_steps": 4, "eval_steps": 6,
        "save_steps": 6, "save_total_limit": 4, "early_stopping_patience": 2, "report_to": "tensorboard",
    }  # fmt: skip
    assert set(other) == set(TrainingSettings.model_fields) - {"output_dir"}
    plain = vars(config_of(load(), tmp_path))
    for name, value in other.items():
        assert vars(config_of(load(**{name: value}), tmp_path)) != plain, name
    assert config_of(load(), tmp_path / "x").output_dir == str(tmp_path / "x")


def test_names_unknown_to_transformers_are_refused_with_all_other_problems() -> None:
    with pytest.raises(SettingsError) as caught:
        load(optim="adam8bit", lr_scheduler_type="linaer", dtype="bf61", task="seq_class", epoch=2)
    for words in (
        "optim 'adam8bit' is not known. Did you mean 'adamw_8bit'?",
        "lr_scheduler_type 'linaer' is not known. Did you mean 'linear'?",
        "dtype 'bf61' is not known. Did you mean 'bf16'?",
        "  - task 'seq_class' is not known. Did you mean",
        "unknown key 'epoch'. Did you mean 'epochs'?",
    ):
        assert words in str(caught.value)


def test_settings_are_read_without_torch() -> None:
    read = "load_run_settings(None, {'model': 'm', 'data': 'd', 'optim': 'adam', 'dtype': 'bf61'})"
    code = (
        "import sys\nfrom tunesmith.training.settings import load_run_settings\n"
        f"try: {read}\nexcept ValueError: sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("name", "near"), [("max_step", "max_steps"), ("evaluation_strategy", "eval_strategy")])
def test_an_unknown_argument_of_the_config_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(TypeError, match=f"unknown argument '{name}'. Did you mean '{near}'?"):
        SFTConfig(**{name: 3})


def test_problems_of_every_kind_come_together():
    flags = {
        "datasets": ["a.jsonl", "b.jsonl"],
        "fast_inference": True,
        "adapter": "qlora",
        "lr": "fast",
        "learning_rat": 1,
        "lora_r": 4,
        "r": 8,
    }
    with pytest.raises(SettingsError) as caught:
        load_run_settings(None, {"model": "smollm2-135m", **flags})
    lines = str(caught.value).splitlines()
    assert lines[0] == "settings: 6 problems"
    wanted = ("datasets: 2 data sets", "fast_inference=True is not", "adapter='qlora' is not", "learning_rate = 'fast'",
              "unknown key 'learning_rat'. Did you mean 'learning_rate'?", "lora_r and r are the same")  # fmt: skip
    for text in wanted:
        assert any(text in line for line in lines), text


def test_one_thing_that_is_not_supported_yet_keeps_its_class():
    with pytest.raises(NotSupportedYetError, match="fast_inference=True is not supported yet"):
        load_run_settings(None, {"model": "m", "data": "d", "fast_inference": True})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": "fast"}, "SFTConfig: learning_rate = 'fast': a number is needed"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0: input should be greater than 0"),
        ({"learning_rate": True}, "learning_rate = True: True is a truth value"),
        ({"num_train_epochs": 0}, "num_train_epochs = 0: input should be greater than 0"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps = -1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size = 0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience = 0"),
        ({"label_smoothing_factor": 2.0}, "label_smoothing_factor = 2.0: input should be less than 1"),
        ({"weight_decay": float("nan")}, "weight_decay = nan: input should be a finite number"),
        ({"max_steps": 2.5}, "max_steps = 2.5: input should be a valid integer"),
        ({"logging_steps": 0}, "logging_steps = 0: input should be greater than 0"),
        ({"eval_steps": -1}, "eval_steps = -1"),
        ({"max_seq_length": 0}, "max_seq_length = 0"),
        ({"packing": "perhaps"}, "packing = 'perhaps': true or false is needed"),
        ({"optim": "adamw8bit"}, "optim 'adamw8bit' is not known. Did you mean 'adamw_8bit'"),
        ({"lr_scheduler_type": "lnear"}, "lr_scheduler_type 'lnear' is not known. Did you mean 'linear'"),
        ({"seed": -1, "max_grad_norm": -1, "save_steps": -1}, "SFTConfig: 3 problems"),
    ],
)
def test_values_of_a_trainer_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SFTConfig(**arguments)


def test_values_of_a_trainer_are_read_as_in_files() -> None:
    """As yaml.safe_load gives them: to it 2e-4 without a point is a text."""
    given: dict[str, Any] = {"learning_rate": "2e-4", "max_steps": "3", "packing": "no", "logging_steps": 0.5}
    config = SFTConfig(**given, optim="lion", lr_scheduler_type="wsd", report_to=None, seed=np.int64(7))
    assert (config.learning_rate, config.max_steps, config.packing, config.logging_steps) == (2e-4, 3, False, 0.5)
    assert (config.optim, config.lr_scheduler_type, config.report_to) == ("lion_32bit", "warmup_stable_decay", [])
    assert (config.seed, type(config.seed)) == (7, int)
    assert type(SFTConfig().learning_rate) is type(LORA_RATE)


def test_arguments_serve_a_second_trainer_as_they_served_the_first(tmp_path: Path) -> None:
    """What one run decides (its steps, that it cannot evaluate) is no argument of the next."""
    given: dict[str, Any] = {"processing_class": tiny.tiny_tokenizer(), "train_dataset": tiny.chat_rows(8)}
    args = SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, eval_split=0, save_total_limit=1, save_steps=1,
                     max_steps=3, disable_tqdm=True)  # fmt: skip
    before = args.to_dict()
    SFTTrainer(support.adapted(), args, **given)
    assert args.to_dict() == before
    second = SFTTrainer(support.adapted(), args, eval_dataset=tiny.chat_rows(4, seed=1), **given)
    assert second.args.load_best_model_at_end is True
    third = SFTTrainer(support.adapted(), args, **given)
    third.train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-3"]


def test_no_clipping_may_be_none(tmp_path: Path) -> None:
    ended = [support.trainer(tmp_path, max_grad_norm=value, rows=8) for value in (None, 0)]
    for trainer in ended:
        trainer.train()
    first, second = (support.trainable(trainer.model) for trainer in ended)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_what_is_set_on_the_arguments_later_counts(tmp_path: Path) -> None:
    def trained(args: SFTConfig) -> SFTConfig:
        rows = {"train_dataset": tiny.chat_rows(40), "processing_class": tiny.tiny_tokenizer()}
        return SFTTrainer(support.adapted(), args, **rows).args

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    args.save_steps, args.eval_steps, args.warmup_steps, args.max_seq_length = 2, 3, 1, 256
    made = trained(args)
    assert (made.save_steps, made.eval_steps, made.warmup_steps, made.max_length) == (2, 3, 1, 256)
    made = trained(args.set_evaluate(strategy="no"))
    assert (made.eval_strategy, made.load_best_model_at_end) == ("no", False)
    with pytest.raises(NotSupportedYetError, match="eval_strategy"):
        trained(args.set_evaluate(strategy="epoch"))


@pytest.mark.parametrize("given", [{}, {"warmup_ratio": 0.1}, {"eval_strategy": "no"}, {"eval_steps": 5}])
def test_a_copy_with_another_value_means_the_same(given: dict[str, Any]) -> None:
    args = SFTConfig(output_dir="runs/x", use_cpu=True, **given)
    other = replace(replace(args, seed=1), seed=args.seed)
    assert other.to_dict() == args.to_dict()
    assert (other.evaluates, other.warmup_asked) == (args.evaluates, args.warmup_asked)
