"""What a trainer decides before its first step: lengths, when to evaluate and save, and whether the rest can work.

Everything that would only fail once training has begun (an optimizer or tracker that is not installed, a schedule that
lacks an argument) is tried here first, so that a mistake leaves no half-made run behind.
"""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers.trainer_utils import IntervalStrategy

from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.core.settings import Settings, validate
from tunesmith.export.weights import check_mergeable
from tunesmith.models.load import facts_of
from tunesmith.training.config import DEFAULT_WARMUP, SFTConfig, needs_evaluation

__all__ = [
    "apply_older_style",
    "check_precision",
    "check_purpose",
    "choose_cadence",
    "length_limit",
    "one_tokenizer",
    "only_pads",
    "refuse_elsewhere",
    "try_out",
]

_log = logging.getLogger(__name__)


class _OlderStyle(Settings):
    max_length: Annotated[int | None, Field(ge=2)] = None
    packing: bool | None = None


def apply_older_style(args: SFTConfig, field: str | None, length: int | None, packing: bool | None) -> None:
    """Write the arguments of the older call style into ``args``; refuse two values for one setting."""
    read = validate(_OlderStyle, {"max_length": length, "packing": packing}, source="SFTTrainer")
    length, packing = read.max_length, read.packing
    for name, value in (("dataset_text_field", field), ("max_length", length), ("packing", packing)):
        current = getattr(args, name)
        if value is None:
            continue
        if current not in (None, False) and current != value:
            raise SettingsError(f"{name}={value!r} is given to the trainer and {current!r} in args. Give one of them.")
        setattr(args, name, value)


_PADDING = (
    "DataCollatorForSeq2Seq",
    "DataCollatorWithPadding",
    "DefaultDataCollator",
    "DataCollatorForLanguageModeling",
)


def only_pads(collator: Any) -> bool:
    """Return whether a collator of transformers or TRL only pads rows, which are joined here and not padded."""
    return type(collator).__name__ in _PADDING and not getattr(collator, "mlm", False)


def refuse_elsewhere(peft_config: Any, compute_metrics: Any, eval_dataset: Any) -> None:
    """Refuse what other trainers do by arguments of these names.

    Raises:
        SettingsError: with what to do instead.
    """
    if peft_config is not None:
        raise SettingsError(
            "peft_config: make the adapter before the trainer, with model = FastLanguageModel.get_peft_model(model, "
            "r=..., lora_alpha=...), or peft.get_peft_model(model, peft_config)."
        )
    if compute_metrics is not None:
        raise SettingsError(
            "compute_metrics: a trainer evaluates loss and perplexity without the logits of all tokens. Score answers "
            "with tunesmith.evaluation.evaluate(model, tokenizer, rows, 'exact_match'), or in a callback."
        )
    if isinstance(eval_dataset, dict):
        raise SettingsError(
            f"eval_dataset has {len(eval_dataset)} data sets by name, and a trainer follows one. Give that one, and "
            "evaluate the others with trainer.evaluate(rows, metric_key_prefix=name)."
        )


def one_tokenizer(processing_class: Any, tokenizer: Any, collator: Any = None) -> Any:
    """Return the tokenizer or processor, under whichever of its two names it was given, else that of the collator.

    A collator for images has a processor, which goes before its own tokenizer given alone.

    Raises:
        SettingsError: two different ones.
        ModelError: none.
    """
    if processing_class is not None and tokenizer is not None and processing_class is not tokenizer:
        raise SettingsError("processing_class and tokenizer are the same argument. Give one of them.")
    chosen = processing_class if processing_class is not None else tokenizer
    own = getattr(collator, "processor", None)
    if own is not None and chosen in (None, own, own.tokenizer):
        return own
    if own is not None:
        raise SettingsError(
            "the VisionDataCollator has another processor than the trainer was given. Give one of them."
        )
    if chosen is None:
        raise ModelError("the tokenizer is missing: give processing_class=tokenizer.")
    return chosen


def check_purpose(model: Any) -> None:
    """Refuse a model with nothing to train, or whose weights would all train though nobody asked for that.

    Raises:
        ModelError: no weight takes gradients, or a base of ours has no adapter and no ``full_finetuning``.
        AdapterError: an adapter could be trained and never merged.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        check_mergeable(name, config)
    _refuse_unsaved(model)
    if hasattr(model, "peft_config") and any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ModelError("the adapter is merged into its base and would not train. Call model.unmerge_adapter() first.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("nothing of this model is trainable. Call FastLanguageModel.get_peft_model(model) first.")
    facts = getattr(model, "tunesmith_facts", None)
    if facts is not None and not facts.full_finetuning and not hasattr(model, "peft_config"):
        raise ModelError(
            "the model has no adapter: call FastLanguageModel.get_peft_model(model) first. To train all of its weights "
            "load it with full_finetuning=True."
        )


def _refuse_unsaved(model: Any) -> None:
    """Refuse weights that train beside an adapter of LoRA and that no file of it would hold."""
    configs = list(getattr(model, "peft_config", {}).values())
    if not configs or any(str(getattr(config.peft_type, "value", config.peft_type)) != "LORA" for config in configs):
        return
    parts = ("lora_", ".modules_to_save.", "trainable_tokens_")
    has_bias = any(config.bias != "none" for config in configs)
    for name, parameter in model.named_parameters():
        is_saved = any(part in name for part in parts) or (has_bias and name.endswith("bias"))
        if parameter.requires_grad and not is_saved:
            raise ModelError(
                f"{name} trains, and no file of the adapter would hold it. Name its module in modules_to_save of "
                "get_peft_model, or freeze it (requires_grad_(False))."
            )


def check_precision(args: SFTConfig, model: Any) -> None:
    """Refuse a precision that is not that of the weights: there is no autocast here.

    ``fp16=not is_bfloat16_supported()`` is what scripts say where there is no bfloat16. A CPU then computes in float32.
    """
    own = facts_of(model).dtype
    if args.asked_for["float16"] and own.dtype == torch.float32 and args.device.type == "cpu":
        _log.warning("fp16=True: on a CPU without bfloat16 this trains in float32, which is faster there than float16")
        return
    for name, asked in args.asked_for.items():
        short = {"bfloat16": "bf16", "float16": "fp16"}[name]
        if asked and name != own.name:
            raise SettingsError(
                f"{short}=True, but the model's weights are {own.name} and this library does not autocast. "
                f"Load the model with dtype={name!r}, or leave {short} out."
            )


def length_limit(asked: int | None, window: int) -> int:
    """Return the longest row in tokens."""
    if asked is not None and asked > window:
        raise SettingsError(
            f"max_length={asked} is above the {window} tokens that the model was loaded with. "
            f"Load it with max_seq_length={asked}, or use at most {window}."
        )
    return asked or window


def choose_cadence(args: SFTConfig, items: int, *, has_eval: bool) -> int:
    """Set when to evaluate and save where nothing was asked, about ten times a run; return the steps of the run."""
    needy = None if has_eval else needs_evaluation(args)
    if needy is not None:
        raise SettingsError(
            f"{needy} needs an evaluation, and no row is set apart for one: give eval_data (in Python "
            "eval_dataset), or an eval_split above 0 of 20 rows or more."
        )
    saves = args.save_strategy != "no"
    if args.load_best_model_at_end and not saves:
        raise SettingsError("load_best_model_at_end=True needs checkpoints: leave save_strategy='no' out.")
    together = args.per_device_train_batch_size * args.world_size
    updates = math.ceil(math.ceil(items / together) / args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    tenth = max(1, math.ceil(total / 10))
    if not args.warmup_asked and args.warmup_steps:
        # A schedule's first warmup step has a rate of zero. Rounded up, that would be all of a run of one step.
        args.warmup_steps = int(DEFAULT_WARMUP * total)
    if args.warmup_asked and args.warmup_steps >= total > 1:
        _log.warning(
            "the warmup of %g steps is not shorter than the run of %d: the rate never reaches learning_rate=%g",
            args.warmup_steps, total, args.learning_rate,
        )  # fmt: skip
    args.eval_strategy = IntervalStrategy("steps" if has_eval else "no")  # type: ignore[assignment]
    args.eval_steps = args.eval_steps or tenth
    args.save_steps = args.save_steps or (args.eval_steps if has_eval else tenth)
    args.load_best_model_at_end = has_eval and saves and args.load_best_model_at_end is not False
    args.metric_for_best_model, args.greater_is_better = ("loss", False) if has_eval else (None, None)
    if args.lr_scheduler_type == "warmup_stable_decay" and not args.lr_scheduler_kwargs:
        args.lr_scheduler_kwargs = {"num_decay_steps": tenth}
    return total


def try_out(args: SFTConfig, model: Any, steps: int) -> None:
    """Build the schedule and look up optimizer and trackers once.

    Raises:
        SettingsError: one of them is not installed, or lacks an argument; the message is that of its library.
    """
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_available_reporting_integrations

    missing = sorted(set(args.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise SettingsError(f"report_to: {missing[0]} is not installed. Install it, or leave report_to out.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError) as error:
        raise SettingsError(f"optim={_word(args.optim)} cannot be used here: {_first_line(error)}") from error
    if _word(args.optim).startswith("paged_ademamix") and args.device.type == "cpu":
        name = _word(args.optim)
        plain = name.removeprefix("paged_").removesuffix("_32bit")
        raise SettingsError(f"optim={name}: its pages need a GPU. Take {plain}, which has none.")
    if _word(args.optim).startswith("paged_") and args.device.type == "cpu":
        note = f"optim={_word(args.optim)}: pages of optimizer state need a GPU; here the states stay in memory"
        facts = facts_of(model)
        facts.notes += [] if note in facts.notes else [note]
    weight = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            weight,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs or None,
        )
    except (TypeError, ValueError) as error:
        name = _word(args.lr_scheduler_type)
        raise SettingsError(f"lr_scheduler_type={name} cannot be used as it is: {_first_line(error)}") from error


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
