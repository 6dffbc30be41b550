"""The trainer's arguments: transformers.TrainingArguments with our defaults and a few fields of our own."""

from __future__ import annotations

import copy
import datetime
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from tunesmith.core.device import choose_device
from tunesmith.core.errors import NotSupportedYetError, SettingsError
from tunesmith.core.names import did_you_mean
from tunesmith.core.settings import Settings, check, complaint
from tunesmith.data.settings import DataSettings
from tunesmith.training.aliases import OPTIMIZERS, SCHEDULERS
from tunesmith.training.settings import LORA_RATE, TrainingSettings

if TYPE_CHECKING:
    from tunesmith.training.settings import RunSettings

__all__ = ["DEFAULT_WARMUP", "SFTConfig", "config_of", "dated_folder", "needs_evaluation"]


class _DefaultWarmup(float):
    """A warmup that nobody asked for: it gives way to none in a run of few steps."""


DEFAULT_WARMUP: float = _DefaultWarmup(0.05)
"""Share of the steps over which the learning rate rises when nothing is said."""


class _DefaultOptim(str):
    """An optimizer that nobody asked for: it gives way to the only one that int8 weights can be updated by."""


DEFAULT_OPTIM: str = _DefaultOptim("adamw_torch_fused")

# Fields of transformers that our batches, loss and evaluation do not go through: set, they would do nothing.
_WITHOUT_EFFECT = (
    "auto_find_batch_size", "average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval",
    "dataloader_drop_last", "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "deepspeed", "eval_accumulation_steps", "eval_do_concat_batches", "fp16_full_eval", "fsdp",
    "include_for_metrics", "parallelism_config", "prediction_loss_only", "push_to_hub",
    "save_only_model", "torch_compile", "torch_compile_backend", "torch_compile_mode", "train_sampling_strategy",
    "use_liger_kernel",
)  # fmt: skip


_OF_THE_ROWS = ("eval_strategy", "eval_steps", "save_steps")


@dataclass
class SFTConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the defaults of ``docs/parameters.md``.

    The learning rate is 2e-4, and 2e-5 where all weights train. Own fields: ``max_length`` (alias ``max_seq_length``),
    ``packing``, ``train_on``, ``on_too_long``, ``eval_split``, ``dataset_text_field``, ``dataset_kwargs`` (of scripts
    with a ``VisionDataCollator``), ``warmup_ratio`` (written to
    ``warmup_steps`` as a fraction, as transformers 5 wants it), ``early_stopping_patience``,
    ``embedding_learning_rate``. ``eval_strategy="no"`` evaluates nothing and holds no rows back.

    Raises:
        SettingsError: two names of one setting disagree, or a value is refused.
        TypeError: an unknown argument; the message names the nearest.
        NotSupportedYetError: a field of transformers that would have no effect here has another value than its default.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> SFTConfig:
        """Refuse an unknown argument with the nearest name, which Python's own error lacks."""
        known = [entry.name for entry in fields(cls) if entry.init]
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            raise TypeError(f"SFTConfig() got an unknown argument {unknown!r}.{did_you_mean(unknown, known)}")
        return super().__new__(cls)

    output_dir: str | None = None
    learning_rate: float = LORA_RATE
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 2
    per_device_eval_batch_size: int = 0
    gradient_accumulation_steps: int = 4
    warmup_steps: float | None = None
    weight_decay: float = 0.01
    seed: int = 3407
    logging_steps: float = 1
    report_to: Any = "none"
    optim: str = DEFAULT_OPTIM
    eval_strategy: str | None = None
    save_strategy: str = "steps"
    save_steps: float = 0
    save_total_limit: int | None = 2
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["targets"])
    load_best_model_at_end: bool | None = None
    restore_callback_states_from_checkpoint: bool = True  # or a patience would begin anew in a run that goes on

    max_length: int | None = None
    max_seq_length: int | None = None
    packing: bool = False
    train_on: Literal["assistant", "all", "last"] | None = None
    on_too_long: Literal["drop", "error", "truncate"] = "drop"
    eval_split: float = 0.05
    dataset_text_field: str | None = None
    dataset_kwargs: dict[str, Any] | None = None
    warmup_ratio: float | None = None
    early_stopping_patience: int | None = None
    embedding_learning_rate: float | None = None

    # What scripts for TRL say too: see _OF_TRL.
    dataset_num_proc: int | None = None
    padding_free: bool | None = None
    packing_strategy: str | None = None
    eval_packing: bool | None = None
    loss_type: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool | None = None

    def __post_init__(self) -> None:
        """Resolve aliases and defaults that depend on each other, then let transformers check the rest."""
        _refuse_without_effect(self)
        _check_values(self)
        _read_trl(self)
        if self.max_length is not None and self.max_seq_length not in (None, self.max_length):
            raise SettingsError("max_length and max_seq_length are the same setting. Give one of them.")
        self.max_length = self.max_length or self.max_seq_length
        self.warmup_steps = _warmup(self)
        # The library casts visibly and never by autocast: bf16 and fp16 only repeat what the weights already are.
        self.asked_for_optim = type(self.optim) is not _DefaultOptim
        self.asked_for = {"bfloat16": bool(self.bf16), "float16": bool(self.fp16)}
        self.bf16 = self.fp16 = False
        self.use_cpu = self.use_cpu or choose_device().type == "cpu"
        self.output_dir = self.output_dir or str(dated_folder())
        self.per_device_eval_batch_size = self.per_device_eval_batch_size or self.per_device_train_batch_size
        # What is left out follows from the rows (choose_cadence); transformers wants something in its place for now.
        left_out = {name: getattr(self, name) for name in _OF_THE_ROWS if not getattr(self, name)}
        self.eval_strategy = self.eval_strategy or ("steps" if needs_evaluation(self) else "no")
        self.save_steps = self.save_steps or 500
        best, self.load_best_model_at_end = self.load_best_model_at_end, None
        super().__post_init__()
        for name, value in {**left_out, "load_best_model_at_end": best}.items():
            setattr(self, name, value)

    @property
    def evaluates(self) -> bool:
        """Whether a run evaluates where there are rows; "no" also holds none back."""
        return _word(self.eval_strategy) != "no"

    @property
    def warmup_asked(self) -> bool:
        """Whether somebody said how long the rate rises."""
        return type(self.warmup_steps) is not _DefaultWarmup

    def for_a_run(self) -> SFTConfig:
        """Return a copy for one trainer to write its choices into.

        What was set on this object since it was made (``args.save_steps = 50``, ``args.set_evaluate(...)``) counts.

        Raises:
            SettingsError, NotSupportedYetError: as at the beginning.
        """
        made = copy.copy(self)
        _refuse_without_effect(made)
        _check_values(made)
        if type(made.optim) is str:
            made.optim, made.asked_for_optim = OptimizerNames(made.optim), True
        made.warmup_steps = _warmup(made)
        made.max_length = made.max_length or made.max_seq_length
        made.eval_split = made.eval_split if made.evaluates else 0.0
        return made


def needs_evaluation(config: SFTConfig) -> str | None:
    """Return the setting that means nothing without an evaluation, or None."""
    save, schedule = _word(config.save_strategy), _word(config.lr_scheduler_type)
    asked = {
        "eval_strategy": _word(config.eval_strategy) == "steps",
        "early_stopping_patience": config.early_stopping_patience is not None,
        "load_best_model_at_end": config.load_best_model_at_end is True,
        f"save_strategy={save}": save == "best",
        f"lr_scheduler_type={schedule}": schedule in ("reduce_lr_on_plateau", "greedy"),
    }
    return next((name for name, is_asked in asked.items() if is_asked), None)


def dated_folder(name: str = "") -> Path:
    """Return ``runs/<date and time>`` with ``-name`` behind it where one is given."""
    return Path("runs") / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}{f'-{name}' if name else ''}"


def _refuse_without_effect(config: SFTConfig) -> None:
    defaults = {entry.name: entry.default for entry in fields(TrainingArguments)}
    for name in _WITHOUT_EFFECT:
        value = getattr(config, name, None)
        if name in defaults and value and value != defaults[name]:
            raise NotSupportedYetError(f"{name}={value!r} is not supported yet. Leave it out.")
    if config.average_tokens_across_devices is False:
        raise NotSupportedYetError("average_tokens_across_devices=False is not supported: losses count tokens.")
    if config.eval_strategy not in (None, "no", "steps"):
        raise NotSupportedYetError(f"eval_strategy={config.eval_strategy!r} is not supported yet. Give eval_steps.")
    if config.metric_for_best_model not in (None, "loss", "eval_loss") or config.greater_is_better:
        raise NotSupportedYetError("the best step has the lowest eval loss: leave metric_for_best_model out.")


class _Steps(Settings):
    """Fields that are no settings of a run, or take more here: shares of all steps, and 0 for none."""

    max_steps: int = -1
    warmup_steps: Annotated[int | float | None, Field(ge=0)] = None
    logging_steps: Annotated[int | float, Field(gt=0)] = 1
    eval_steps: Annotated[int | float | None, Field(ge=0)] = None
    save_steps: Annotated[int | float, Field(ge=0)] = 0
    per_device_eval_batch_size: Annotated[int, Field(ge=0)] = 0
    max_seq_length: Annotated[int | None, Field(ge=2)] = None
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0


# Fields that take what the setting of the same name takes.
_AS_SETTINGS = (
    "learning_rate", "num_train_epochs", "weight_decay", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_grad_norm", "neftune_noise_alpha", "seed", "max_length", "early_stopping_patience", "embedding_learning_rate",
    "warmup_ratio", "save_total_limit", "lr_scheduler_type", "optim", "packing", "eval_split",
)  # fmt: skip


def _check_values(config: SFTConfig) -> None:
    """Refuse values of another type or out of range, all at once; a text that is a number becomes one."""
    if config.max_grad_norm is None:
        config.max_grad_norm = 0.0  # no clipping either, in scripts for older versions
    defaults = {entry.name: entry.default for entry in fields(config)}
    left_out = (type(LORA_RATE), _DefaultWarmup, _DefaultOptim)  # a copy of a default is none by identity
    given = {name: getattr(config, name) for name in (*_AS_SETTINGS, *_Steps.model_fields)}
    given = {
        name: getattr(value, "value", value)
        for name, value in given.items()
        if value is not defaults[name] and not isinstance(value, left_out)
    }
    problems: list[str] = []
    for kind in (TrainingSettings, DataSettings, _Steps):
        own = _Steps.model_fields if kind is _Steps else set(kind.model_fields) - set(_Steps.model_fields)
        values = {name: value for name, value in given.items() if name in own}
        read, wrong = check(kind, {**values, "data": ""} if kind is DataSettings else values)
        problems += wrong
        for name, value in values.items() if read is not None else ():
            if (type(value), value) != (type(new := getattr(read, name)), new):
                setattr(config, name, new)
    if problems:
        raise complaint("SFTConfig", problems)
    config.lr_scheduler_type = SCHEDULERS.get(config.lr_scheduler_type, config.lr_scheduler_type)
    config.optim = OPTIMIZERS.get(config.optim, config.optim)
    config.report_to = "none" if config.report_to is None else config.report_to


# Field of TRL -> values that ask for what is done anyway, and why others are refused.
_OF_TRL: dict[str, tuple[tuple[Any, ...], str]] = {
    "padding_free": ((None, True, False), ""),  # documents are joined and never padded
    "packing_strategy": ((None, "bfd"), "packing=True fills bins with whole documents, best fit first"),
    "eval_packing": ((None, False), "rows to evaluate on are not packed"),
    "loss_type": ((None, "nll"), "the loss is the negative log-likelihood"),
    "eos_token": ((None,), "set it on the tokenizer"),
    "pad_token": ((None,), "documents are not padded"),
}


def _read_trl(config: SFTConfig) -> None:
    for name, (fine, reason) in _OF_TRL.items():
        value = getattr(config, name)
        if value not in fine:
            raise SettingsError(f"{name}={value!r}: {reason}. Leave it out.")
    only = {config.completion_only_loss, config.assistant_only_loss} - {None}
    if not only:
        return
    asked = "assistant" if True in only else "all"
    if config.train_on not in (None, asked):
        raise SettingsError(
            f"completion_only_loss and assistant_only_loss ask for train_on={asked!r}, which is {config.train_on!r}. "
            "Leave them out."
        )
    config.train_on = asked


def _warmup(config: SFTConfig) -> float:
    """Return ``warmup_steps`` as transformers wants it: a number of steps, or a share below 1."""
    ratio, steps = config.warmup_ratio, config.warmup_steps
    steps = None if type(steps) is _DefaultWarmup else steps
    if ratio is not None and steps not in (None, ratio):
        raise SettingsError("warmup_ratio and warmup_steps both set the warmup. Give one of them.")
    if ratio is not None and not 0 <= ratio < 1:
        raise SettingsError(f"warmup_ratio={ratio} must be in [0, 1).")
    asked = ratio if steps is None else steps
    if _word(config.lr_scheduler_type) == "constant":
        if asked:
            raise SettingsError("lr_scheduler_type=constant has no warmup. Use constant_with_warmup, or leave it out.")
        return 0
    return DEFAULT_WARMUP if asked is None else asked


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def config_of(settings: RunSettings, output_dir: Path) -> SFTConfig:
    """Return the trainer's arguments for a run.

    Raises:
        SettingsError: the optimizer, the schedule or a tracker is not known to transformers.
    """
    same = (
        "num_train_epochs", "learning_rate", "weight_decay", "per_device_train_batch_size", "max_length",
        "gradient_accumulation_steps", "packing", "train_on", "on_too_long", "max_grad_norm", "neftune_noise_alpha",
        "seed", "logging_steps", "eval_steps", "save_total_limit", "early_stopping_patience", "report_to",
        "warmup_steps", "warmup_ratio", "embedding_learning_rate",
    )  # fmt: skip
    try:
        return SFTConfig(
            output_dir=str(output_dir),
            run_name=output_dir.name,
            max_steps=settings.max_steps or -1,
            save_steps=settings.save_steps or 0,
            per_device_eval_batch_size=settings.per_device_eval_batch_size or 0,
            lr_scheduler_type=SCHEDULERS.get(settings.lr_scheduler_type, settings.lr_scheduler_type),
            optim=OPTIMIZERS.get(settings.optim, settings.optim),
            eval_split=0,  # The run has split its rows already.
            **{name: getattr(settings, name) for name in same},
        )
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"settings refused by transformers: {error}") from error
