"""The trainer's arguments: transformers.TrainingArguments with our defaults and a few fields of our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainingArguments

from tunesmith.core.errors import NotSupportedYetError, SettingsError

if TYPE_CHECKING:
    from tunesmith.training.settings import RunSettings

__all__ = ["SFTConfig", "config_of"]


@dataclass
class SFTConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the defaults of ``docs/parameters.md``.

    Own fields: ``max_length`` (alias ``max_seq_length``), ``packing``, ``train_on``, ``on_too_long``, ``eval_split``,
    ``dataset_text_field``, ``warmup_ratio`` (written to ``warmup_steps`` as a fraction, as transformers 5 wants it),
    ``early_stopping_patience``.

    Raises:
        SettingsError: two names of one setting disagree, or a value is refused.
        NotSupportedYetError: mixed precision by autocast (``fp16``/``bf16`` with weights of another dtype) and others.
    """

    output_dir: str | None = None
    learning_rate: float = 2e-4
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 2
    per_device_eval_batch_size: int = 0
    gradient_accumulation_steps: int = 4
    weight_decay: float = 0.01
    seed: int = 3407
    logging_steps: float = 1
    report_to: Any = "none"
    optim: str = "adamw_torch_fused"
    save_strategy: str = "steps"
    save_steps: float = 0
    save_total_limit: int | None = 2
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["targets"])
    load_best_model_at_end: bool | None = None

    max_length: int | None = None
    max_seq_length: int | None = None
    packing: bool = False
    train_on: Literal["assistant", "all", "last"] | None = None
    on_too_long: Literal["drop", "error", "truncate"] = "drop"
    eval_split: float = 0.0
    dataset_text_field: str | None = None
    warmup_ratio: float | None = None
    early_stopping_patience: int | None = None

    def __post_init__(self) -> None:
        """Resolve aliases and defaults that depend on each other, then let transformers check the rest."""
        if self.max_length is not None and self.max_seq_length not in (None, self.max_length):
            raise SettingsError("max_length and max_seq_length are the same setting. Give one of them.")
        self.max_length = self.max_length or self.max_seq_length
        if self.warmup_ratio is not None and self.warmup_steps:
            raise SettingsError("warmup_ratio and warmup_steps both set the warmup. Give one of them.")
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise SettingsError(f"warmup_ratio={self.warmup_ratio} must be in [0, 1).")
            self.warmup_steps = self.warmup_ratio
        if self.label_smoothing_factor:
            raise NotSupportedYetError("label_smoothing_factor is not supported yet. Leave it at 0.")
        if self.fp16:
            raise NotSupportedYetError("fp16 training is not supported yet. Load the model in bfloat16 or float32.")
        # The library casts visibly and never by autocast: bf16=True only repeats what the weights already are.
        self.asked_for_bf16, self.bf16 = bool(self.bf16), False
        self.output_dir = self.output_dir or str(Path("runs") / _dated_name())
        self.per_device_eval_batch_size = self.per_device_eval_batch_size or self.per_device_train_batch_size
        self.eval_steps_asked, self.save_steps_asked = self.eval_steps, self.save_steps
        if not self.save_steps:
            self.save_steps = 500
        super().__post_init__()


def _dated_name() -> str:
    import datetime

    return datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")


_SCHEDULERS = {"wsd": "warmup_stable_decay"}
_OPTIMIZERS = {"lion": "lion_32bit"}


def config_of(settings: RunSettings, output_dir: Path) -> SFTConfig:
    """Return the trainer's arguments for a run.

    Raises:
        SettingsError: the optimizer, the schedule or a tracker is not known to transformers.
    """
    warmup: dict[str, Any] = (
        {"warmup_steps": settings.warmup_steps}
        if settings.warmup_steps is not None
        else {"warmup_ratio": 0.05 if settings.warmup_ratio is None else settings.warmup_ratio}
    )
    try:
        return SFTConfig(
            output_dir=str(output_dir),
            num_train_epochs=settings.num_train_epochs,
            max_steps=settings.max_steps or -1,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=_SCHEDULERS.get(settings.lr_scheduler_type, settings.lr_scheduler_type),
            weight_decay=settings.weight_decay,
            per_device_train_batch_size=settings.per_device_train_batch_size,
            per_device_eval_batch_size=settings.per_device_eval_batch_size or 0,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            max_length=settings.max_length,
            packing=settings.packing,
            train_on=settings.train_on,
            on_too_long=settings.on_too_long,
            optim=_OPTIMIZERS.get(settings.optim, settings.optim),
            max_grad_norm=settings.max_grad_norm,
            neftune_noise_alpha=settings.neftune_noise_alpha,
            seed=settings.seed,
            logging_steps=settings.logging_steps,
            eval_steps=settings.eval_steps,
            save_steps=settings.save_steps or 0,
            save_total_limit=settings.save_total_limit,
            early_stopping_patience=settings.early_stopping_patience,
            report_to=settings.report_to,
            run_name=output_dir.name,
            **warmup,
        )
    except ValueError as error:
        raise SettingsError(f"settings refused by transformers: {error}") from error
