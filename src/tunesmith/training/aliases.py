"""Key names of other tools, accepted and said aloud.

People come with the settings file of Axolotl, LLaMA-Factory, torchtune, TRL, Unsloth or mlx-lm. Keys that mean the same
are translated to ours; a key that only looks the same is not here, and is refused as unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.core.errors import NotSupportedYetError, SettingsError, TunesmithError

__all__ = ["ALIASES", "KNOWN", "OPTIMIZERS", "SCHEDULERS", "translate"]

ALIASES = {
    "base_model": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "local_dataset": "data",
    "eval_dataset": "eval_data",
    "dataset_val": "eval_data",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_sequence_length": "max_seq_length",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "iters": "max_steps",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "lr_schedule": "lr_scheduler_type",
    "num_warmup_steps": "warmup_steps",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target": "target_modules",
    "lora_target_linear": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "additional_target": "modules_to_save",
    "gradient_checkpointing": "use_gradient_checkpointing",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "val_set_size": "eval_split",
    "val_size": "eval_split",
    "test_split_size": "eval_split",
    "adapter_path": "output_dir",
    "train_on_inputs": "train_on",
    "train_on_input": "train_on",
    "train_on_prompt": "train_on",
    "train_on_completions": "train_on",
    "assistant_only_loss": "train_on",
    "completion_only_loss": "train_on",
    "mask_prompt": "train_on",
    "mask_history": "train_on",
    "early_stopping_steps": "early_stopping_patience",
    "column_map": "map",
    "optimizer": "optim",
    "task_type": "task",
}
"""Other tools' key -> ours."""

# Keys that choose what is the only thing here: accepted where they say so, refused by name where they do not.
_GIVEN = {
    "adapter": "lora",
    "finetuning_type": "lora",
    "fine_tune_type": "lora",
    "training_type": "lora",
    "use_peft": True,
}

_INPUTS_TOO = {"train_on_inputs", "train_on_input", "train_on_prompt"}
_ANSWERS_ONLY = {"train_on_completions", "assistant_only_loss", "completion_only_loss", "mask_prompt"}
OPTIMIZERS = {"lion": "lion_32bit", "adamw": "adamw_torch_fused"}
SCHEDULERS = {"wsd": "warmup_stable_decay"}

# Written down, because importing transformers takes seconds; a test holds them to what it knows.
KNOWN: dict[str, tuple[str, ...]] = {
    "optim": (
        "adamw_torch_fused", "adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "adamw_torch_4bit",
        "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "adafactor", "adagrad", "sgd", "rmsprop",
        "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "lion_32bit", "lion_8bit", "ademamix", "ademamix_8bit",
        "paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit", "paged_ademamix_32bit",
        "paged_ademamix_8bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw",
        "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise",
        "stable_adamw", *OPTIMIZERS,
    ),
    "lr_scheduler_type": (
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
        *SCHEDULERS,
    ),
}  # fmt: skip
"""Setting -> the values that transformers or we have a name for."""


def translate(values: Mapping[str, Any], problems: dict[str, TunesmithError]) -> tuple[dict[str, Any], list[str]]:
    """Return ``values`` under our names, and one line for every alias used.

    A setting that cannot be translated is left out and its error is put into ``problems`` under our name for it: it is
    given under two names, has a value without a counterpart here, or asks for what is not supported yet.
    """
    translated: dict[str, Any] = {}
    used: list[str] = []
    origin: dict[str, str] = {}
    for key, value in values.items():
        ours = ALIASES.get(key, key)
        try:
            if _is_given(key, value):
                used.append(f"{key}: {value} is what is always done")
                continue
            if ours in origin:
                raise SettingsError(f"{origin[ours]} and {key} are the same setting ({ours}). Give one of them.")
            origin[ours] = key
            new = _value(key, ours, value)
        except TunesmithError as error:
            problems[ours] = error
            continue
        if ours != key or new != value:
            used.append(f"{key}: {value} is read as {ours}: {new}")
        translated[ours] = new
    return translated, used


def _is_given(key: str, value: Any) -> bool:
    """Return whether a key says what is done anyway; raise where it asks for something else."""
    if key in ("resume_from_checkpoint", "auto_resume_from_checkpoints"):
        raise SettingsError(f"{key} is the switch --resume of `tunesmith train`. Leave it out of the settings.")
    if key == "quantization_bit" and value:
        raise NotSupportedYetError(f"quantization_bit={value!r} is not supported yet. Leave it out.")
    if key not in _GIVEN:
        return key == "quantization_bit"
    if value != _GIVEN[key]:
        raise NotSupportedYetError(f"{key}={value!r} is not supported yet: adapters are LoRA on a 16-bit base.")
    return True


def _value(key: str, ours: str, value: Any) -> Any:
    """Return ``value`` in our terms where a tool writes it differently."""
    if key in _INPUTS_TOO or key in _ANSWERS_ONLY:
        return "all" if _truth(key, value) == (key in _INPUTS_TOO) else "assistant"
    if key == "mask_history":
        return "last" if _truth(key, value) else "assistant"
    if key == "lora_target_linear":
        if not _truth(key, value):
            raise SettingsError("lora_target_linear: false names no layers. Give target_modules.")
        return "all-linear"
    if key in ("lora_target", "lora_target_modules", "target_modules") and isinstance(value, str):
        return _targets(value)
    if ours == "data" and isinstance(value, list):
        return _only_dataset(key, value)
    named: Mapping[str, str] = {"optim": OPTIMIZERS, "lr_scheduler_type": SCHEDULERS}.get(ours, {})
    return named.get(value, value) if isinstance(value, str) else value


def _targets(value: str) -> Any:
    if value == "all":
        return "all-linear"
    # LLaMA-Factory and Unsloth's command line write a comma-separated list; a regular expression keeps its commas.
    names = [name.strip() for name in value.split(",")]
    return names if len(names) > 1 and all(name.isidentifier() for name in names) else value


def _only_dataset(key: str, entries: list[Any]) -> Any:
    if len(entries) != 1:
        raise SettingsError(
            f"{key}: {len(entries)} data sets; one is read here. Join the files into one folder or file."
        )
    entry = entries[0]
    if isinstance(entry, dict):
        if set(entry) - {"path", "type"}:
            unknown = sorted(set(entry) - {"path", "type"})[0]
            raise SettingsError(f"{key}: the key {unknown!r} of a data set has no counterpart here. Give data: PATH.")
        return entry.get("path")
    return entry


def _truth(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise SettingsError(f"{key} = {value!r}: true or false is needed")
    return value
