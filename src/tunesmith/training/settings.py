"""All settings of a run, in one strict flat model: what a YAML file and the flags of ``tunesmith train`` may say.

``load_run_settings`` reads file, flags and ``--set`` into a :class:`RunSettings`; ``config.py`` turns its training
part into an :class:`~tunesmith.training.config.SFTConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tunesmith.adapters.settings import AdapterSettings
from tunesmith.core.errors import NotSupportedYetError, TunesmithError
from tunesmith.core.names import did_you_mean
from tunesmith.core.settings import Guide, Settings, check, complaint, read_yaml
from tunesmith.core.tasks import CAUSAL_LM
from tunesmith.data.settings import DataSettings
from tunesmith.models.settings import ModelSettings
from tunesmith.training.aliases import ALIASES, KNOWN, translate

__all__ = [
    "FULL_RATE",
    "INT8_OPTIM",
    "LORA_RATE",
    "ONLY_INT8_OPTIM",
    "RunSettings",
    "TrainingSettings",
    "load_run_settings",
]


class _DefaultRate(float):
    """A rate that nobody asked for: it gives way to that of full fine-tuning."""


LORA_RATE: float = _DefaultRate(2e-4)
FULL_RATE = 2e-5
"""Learning rate of full fine-tuning when nothing is said, a tenth of that of adapters."""

INT8_OPTIM = "adamw_torch_8bit"
"""The one optimizer that updates int8 weights: torchao's AdamW with states of 8 bits, under transformers' name."""
ONLY_INT8_OPTIM = (
    f"int8 weights can only be updated by {INT8_OPTIM} (torchao's AdamW8bit): other optimizers raise on them, or would "
    "lose most steps to rounding. Leave optim out."
)

# Arguments of the published contract that are not written yet. They are refused by name, never unknown.
_NOT_YET = ("fast_inference",)
# Settings that mean nothing, or are not written yet, for other tasks than language modelling.
_LANGUAGE_ONLY = ("packing", "train_on", "chat_template", "rope_scaling", "load_in_4bit", "load_in_8bit", "load_in_fp8",
                  "init_data", "qat_scheme")  # fmt: skip


class TrainingSettings(Settings):
    """How long, how fast and in which steps; names as in transformers.TrainingArguments."""

    output_dir: str | None = None
    """Folder of the run; none makes runs/<date>-<model>. A folder with another run in it is refused."""

    num_train_epochs: Annotated[
        float,
        Field(gt=0),
        Guide(
            "1 to 3", "underfits", "overfits and costs creativity, though it can reduce hallucination on a closed set"
        ),
    ] = 1.0
    """How often each row is seen."""

    max_steps: Annotated[int | None, Field(ge=1)] = None
    """Stop after this many optimizer steps; overrides num_train_epochs."""

    learning_rate: Annotated[
        float,
        Field(gt=0, lt=1),
        Guide("5e-5 to 2e-4 for large models, up to 2e-3 for small ones", "needs more epochs", "the loss diverges"),
    ] = 2e-4
    """Step size of the optimizer; 2e-5 with full_finetuning, which wants about a tenth of the rate of LoRA."""

    embedding_learning_rate: Annotated[
        float | None, Field(gt=0, lt=1), Guide("a tenth of learning_rate", "new tokens stay strange", "words drift")
    ] = None
    """Step size of embedding and output head where they train (modules_to_save, target_modules, full_finetuning); none
    means a tenth of learning_rate where they train whole beside an adapter, and learning_rate elsewhere."""

    lr_scheduler_type: Annotated[str, Guide("linear or cosine", "constant: no decay", "cosine: late, steep decay")] = (
        "linear"
    )
    """linear, cosine, constant, constant_with_warmup, warmup_stable_decay (alias wsd) or another of transformers."""

    warmup_ratio: Annotated[
        float | None, Field(ge=0, lt=1), Guide("0.05 to 0.1", "early steps may jump", "time lost at a low rate")
    ] = None
    """Share of all steps over which the rate rises; 0.05 when neither this nor warmup_steps is given."""

    warmup_steps: Annotated[int | None, Field(ge=0)] = None
    """Number of steps over which the rate rises; excludes warmup_ratio."""

    weight_decay: Annotated[
        float, Field(ge=0), Guide("0.001 to 0.1", "more overfitting", "the adapter is pulled to zero")
    ] = 0.01
    """AdamW decay on A and B, none on biases and norms."""

    per_device_train_batch_size: Annotated[
        int, Field(ge=1), Guide("1 to 16", "slower on a GPU", "more memory; raise accumulation instead")
    ] = 2
    """Documents (with packing: bins) of one micro-batch on each device."""

    gradient_accumulation_steps: Annotated[
        int, Field(ge=1), Guide("1 to 16", "noisy gradients", "fewer optimizer steps an epoch")
    ] = 4
    """Micro-batches of one optimizer step. The same effective batch gives the same gradient however it is split."""

    per_device_eval_batch_size: Annotated[int | None, Field(ge=1)] = None
    """Documents of one evaluation batch; none means the training size."""

    max_length: Annotated[
        int | None, Field(ge=2), Guide("fit to the data", "rows are dropped", "costs memory on long rows")
    ] = None
    """Longest training row in tokens; none means max_seq_length."""

    optim: Annotated[str, Guide("adamw_torch_fused")] = "adamw_torch_fused"
    """adamw_torch_fused, adamw_torch, adamw_8bit, paged_adamw_8bit (pages need a GPU), adafactor, sgd, lion_32bit
    (alias lion) or another name of transformers."""

    max_grad_norm: Annotated[
        float, Field(ge=0), Guide("0.3 to 1.0", "slow learning", "a bad batch moves far; 0: no clipping")
    ] = 1.0
    """Gradients with a larger norm are scaled down to it."""

    neftune_noise_alpha: Annotated[float | None, Field(gt=0), Guide("5", "no effect", "noise drowns the input")] = None
    """NEFTune noise on the embeddings (Jain et al. 2023, arXiv:2310.05914)."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 3407
    """Seeds data order and dropout. Same seed, machine and settings: same bytes."""

    logging_steps: Annotated[int, Field(ge=1)] = 1
    """Write a line of metrics every so many steps."""

    eval_steps: Annotated[int | None, Field(ge=1)] = None
    """Evaluate every so many steps; none means about ten times a run."""

    save_steps: Annotated[int | None, Field(ge=1)] = None
    """Write a checkpoint every so many steps; none means at each evaluation."""

    save_total_limit: Annotated[int | None, Field(ge=1)] = 2
    """Newest checkpoints kept; the best one is kept besides."""

    early_stopping_patience: Annotated[
        int | None, Field(ge=1), Guide("2 to 5 evaluations", "stops on noise", "trains on after the best step")
    ] = None
    """Stop when the eval loss has not fallen for so many evaluations; none never stops early."""

    report_to: (
        list[Literal["none", "tensorboard", "wandb", "mlflow", "trackio", "swanlab", "comet_ml"]]
        | Literal["none", "tensorboard", "wandb", "mlflow", "trackio", "swanlab", "comet_ml"]
    ) = "none"
    """Experiment trackers; none by default. metrics.jsonl is always written."""

    @field_validator("optim", "lr_scheduler_type")
    @classmethod
    def _a_known_word(cls, value: str, info: ValidationInfo) -> str:
        known = KNOWN[info.field_name or ""]
        if value not in known:
            raise ValueError(
                f"{info.field_name} {value!r} is not known.{did_you_mean(value, known)} "
                f"`tunesmith explain {info.field_name}` names the usual ones."
            )
        return value

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("warmup_ratio and warmup_steps both set the warmup. Give one of them.")
        return self


class RunSettings(ModelSettings, DataSettings, AdapterSettings, TrainingSettings):
    """Everything that one training run needs."""

    other_names: ClassVar[Sequence[str]] = tuple(ALIASES)

    @model_validator(mode="after")
    def _sources_agree(self) -> Self:
        if self.early_stopping_patience is not None and self.eval_data is None and self.eval_split == 0:
            raise ValueError("early_stopping_patience needs an evaluation: give eval_data or an eval_split above 0.")
        if self.eval_steps is not None and self.eval_data is None and self.eval_split == 0:
            raise ValueError("eval_steps needs an evaluation: give eval_data or an eval_split above 0.")
        if self.eval_data is not None and self.eval_split not in (0, type(self).model_fields["eval_split"].default):
            raise ValueError("eval_data is what is evaluated on, and eval_split would set rows apart. Leave one out.")
        if self.max_length is not None and self.max_seq_length is not None and self.max_length > self.max_seq_length:
            raise ValueError(f"max_length={self.max_length} is above max_seq_length={self.max_seq_length}.")
        if self.needs_rows != (self.init_data is not None):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} starts from rows of data: give init_data."
                if self.needs_rows
                else "init_data is looked at by init_lora_weights eva, corda and lora_ga alone. Leave it out."
            )
        if self.finetune_last_n_layers is not None and self.layers_to_transform is not None:
            raise ValueError("finetune_last_n_layers and layers_to_transform both choose layers. Give one of them.")
        return self

    @model_validator(mode="after")
    def _all_weights_or_an_adapter(self) -> Self:
        if not self.full_finetuning:
            return self
        if self.offload_embedding:
            raise ValueError(
                "offload_embedding keeps a frozen embedding in host memory, and full_finetuning trains it."
            )
        if self.width == "8bit" and self.optim != INT8_OPTIM and "optim" in self.model_fields_set:
            raise ValueError(f"optim={self.optim}: {ONLY_INT8_OPTIM}")
        idle = sorted(self.model_fields_set & set(self.of_adapters))
        if idle:
            raise ValueError(f"full_finetuning trains all weights and no adapter: leave out {', '.join(idle)}.")
        return self

    @model_validator(mode="after")
    def _what_a_task_takes(self) -> Self:
        fields = type(self).model_fields
        idle = [name for name in _LANGUAGE_ONLY if getattr(self, name) != fields[name].default]
        if self.task != CAUSAL_LM and idle:
            raise ValueError(f"{', '.join(idle)}: for CAUSAL_LM only, and the task is {self.task}. Leave it out.")
        return self

    @property
    def of_adapters(self) -> tuple[str, ...]:
        """The settings that mean nothing without an adapter."""
        shared = ("use_gradient_checkpointing", "temporary_location", "random_state")
        return tuple(name for name in AdapterSettings.model_fields if name not in shared)

    def resolved(self) -> dict[str, Any]:
        """Return every setting that counts, as plain values."""
        return self.model_dump(exclude=set(self.of_adapters) if self.full_finetuning else None)

    def part(self, kind: type[Settings]) -> Any:
        """Return the fields of one of the parent classes as an instance of it."""
        return kind.model_construct(**{name: getattr(self, name) for name in kind.model_fields})


def load_run_settings(file: Path | None, flags: Mapping[str, Any]) -> tuple[RunSettings, list[str]]:
    """Return the settings of a YAML ``file`` with ``flags`` on top, and a line for every alias that was used.

    Raises:
        SettingsError: every unknown key, wrong type, bad value and conflict, all in one message.
    """
    problems: dict[str, TunesmithError] = {}
    values, used = translate(read_yaml(file), problems) if file is not None else ({}, [])
    overrides, more = translate(flags, problems)
    # A flag for one half of a pair replaces the other half of the file, or the two would conflict.
    for ours, other in (("warmup_ratio", "warmup_steps"), ("warmup_steps", "warmup_ratio")):
        if ours in overrides and other not in overrides:
            values.pop(other, None)
    values.update(overrides)
    for name in _NOT_YET:
        value = values.pop(name, None)
        # An option that is off asks for nothing.
        if value not in (None, False):
            problems[name] = NotSupportedYetError(f"{name}={value!r} is not supported yet. Leave it out.")
    settings, others = check(RunSettings, values)
    if settings is not None and not problems:
        if settings.full_finetuning and "learning_rate" not in settings.model_fields_set:
            settings = settings.replace(learning_rate=FULL_RATE)
        if settings.full_finetuning and settings.width == "8bit":
            settings = settings.replace(optim=INT8_OPTIM)
        return settings, [*used, *more]
    # A setting whose value could not be translated is not missing.
    others = [text for text in others if not any(text.startswith(f"{name} is missing") for name in problems)]
    if len(problems) == 1 and not others:
        raise next(iter(problems.values()))
    raise complaint(str(file) if file is not None else "settings", [*map(str, problems.values()), *others])
