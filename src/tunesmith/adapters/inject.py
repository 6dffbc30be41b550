"""Put a LoRA adapter on a loaded model: targets checked, A seeded, checkpointing set."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tunesmith.adapters.config import arguments_of, as_adapter_error, lora_config
from tunesmith.adapters.loftq import round_base
from tunesmith.adapters.model import as_adapter_model, refuse_quantized
from tunesmith.adapters.rows import check_sizes, look_before, start_eva
from tunesmith.adapters.settings import FILTERS, AdapterSettings
from tunesmith.core.errors import AdapterError, NotSupportedYetError, SettingsError
from tunesmith.core.names import did_you_mean
from tunesmith.core.seeds import seeded
from tunesmith.core.tasks import CAUSAL_LM
from tunesmith.core.versions import checkpoint_layers
from tunesmith.engine.install import engine_of
from tunesmith.engine.policies import Policy
from tunesmith.engine.read import is_quantized
from tunesmith.models.load import facts_of
from tunesmith.models.qat import prepare, refuse_other_scheme
from tunesmith.models.quantize import is_misread
from tunesmith.models.settings import Width
from tunesmith.models.whole import is_torchaos, train_in

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from tunesmith.data.prepare import PreparedData

__all__ = [
    "check_checkpointing",
    "continue_adapter",
    "inject_adapter",
    "refuse_beside_rounding",
    "set_checkpointing",
    "train_all_weights",
    "trainable_share",
]

# How a new adapter starts: no property of one that is there already.
_STARTS = ("random_state", "init_lora_weights", "loftq_config")

_log = logging.getLogger(__name__)


def inject_adapter(
    model: PreTrainedModel | PeftModel,
    settings: AdapterSettings,
    rows: PreparedData | None = None,
    *,
    qat_scheme: Any = None,
) -> PeftModel:
    """Return ``model`` with a new trainable LoRA adapter; A and B are float32, whatever the base is.

    With a ``qat_scheme`` base and adapter are rounded together wherever they compute (``models/qat.py``).

    A model that already carries an adapter with the same settings keeps it, and only its checkpointing is set.
    ``rows`` are what eva, corda and lora_ga start from.

    Raises:
        AdapterError: a target or pattern matches nothing, layers are asked for that do not exist, settings exclude
            each other, rows are missing or useless, or the model already has an adapter with other settings.
        SettingsError: see :func:`set_checkpointing`.
        OutputError: ``temporary_location`` is a file or cannot be written.
    """
    from peft import PeftModel, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_checkpointing(settings.use_gradient_checkpointing)
    _set_location(model, settings.temporary_location)
    if isinstance(model, PeftModel):
        _refuse_second(model, settings, rows)
        refuse_other_scheme(model, qat_scheme)
        set_checkpointing(model, settings.use_gradient_checkpointing)
        return model
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError(
            "this model is the base of an adapter that is there already. Go on with the model that get_peft_model "
            "returned, or take the adapter off first: base = model.unload()."
        )
    if is_torchaos(model):
        raise AdapterError(
            "torchao has quantized this model to be used, and not to be trained on. Adapt the model in 16 bits; with "
            "qat_scheme it is trained for the same quantization."
        )
    if settings.takes_from_base or settings.rounds_base:
        refuse_quantized(model)
    _refuse_misread(model, settings)
    facts = facts_of(model)
    if facts.task != CAUSAL_LM and (settings.needs_rows or settings.rounds_base):
        raise NotSupportedYetError(
            f"init_lora_weights={settings.init_lora_weights!r} with task_type={facts.task!r} is not supported yet. Use "
            "True, 'gaussian', 'orthogonal', 'pissa' or 'olora'."
        )
    with as_adapter_error(model):
        config = lora_config(model, settings)
        has_values = not model.get_input_embeddings().weight.is_meta
        if settings.takes_from_base:
            ranks = _ranks(model, config)
            check_sizes({name: model.get_submodule(name) for name in ranks}, ranks, str(settings.init_lora_weights))
        if has_values:
            _check_rows(settings, rows)
        else:
            config.init_lora_weights = True  # shapes alone are wanted
        if qat_scheme is not None:
            refuse_beside_rounding(config, rounds_base=settings.rounds_base)
            prepare(model, qat_scheme)
        with seeded(settings.random_state):
            if rows is not None and settings.takes_from_base:
                look_before(model, config, rows, _ranks(model, config))
            adapted = get_peft_model(model, config)
            if rows is not None and not settings.takes_from_base:
                start_eva(adapted, rows)
    if settings.init_lora_weights == "orthogonal" and any(is_quantized(module) for module in model.modules()):
        config.init_lora_weights = True  # PEFT would start so again wherever the adapter is loaded, and cannot on codes
    # PEFT adds the names of heads to those that are there.
    config.modules_to_save = sorted(set(config.modules_to_save or ())) or None
    if settings.loftq_config is not None:
        _start_loftq(adapted, settings.loftq_config, has_values=has_values)
    facts = facts_of(model)
    keeps_base = settings.rounds_base or facts.is_merged
    as_adapter_model(adapted, takes_from_base=settings.takes_from_base and has_values, keeps_base=keeps_base)
    facts.adapter = {**arguments_of(config), **_start_of(settings, rows)}
    adapted.tunesmith_facts = facts
    set_checkpointing(adapted, settings.use_gradient_checkpointing)
    return adapted


def _start_of(settings: AdapterSettings, rows: PreparedData | None) -> dict[str, Any]:
    """Return what a new adapter starts from, as comparable values."""
    own = {name: getattr(settings, name) for name in _STARTS}
    return {**own, "init_data": None if rows is None else rows.fingerprint()}


def _check_rows(settings: AdapterSettings, rows: PreparedData | None) -> None:
    if settings.needs_rows and rows is None:
        raise AdapterError(
            f"init_lora_weights={settings.init_lora_weights!r} starts from rows of data: give init_data, best the "
            "training rows."
        )
    if rows is not None and not settings.needs_rows:
        raise AdapterError(
            "init_data is looked at by eva, corda and lora_ga, and not by init_lora_weights="
            f"{settings.init_lora_weights!r}. Leave it out."
        )


def _refuse_misread(model: Any, settings: AdapterSettings) -> None:
    """Refuse DoRA where its norms would come from a weight that bitsandbytes reads wrongly."""
    wrong = next((name for name, module in model.named_modules() if is_misread(module)), None)
    if settings.use_dora and wrong is not None:
        raise AdapterError(
            f"use_dora with load_in_4bit: on this processor (AVX512) bitsandbytes reads {wrong} wrongly, whose "
            "columns 64 does not divide, and DoRA takes norms from it. Leave use_dora or load_in_4bit out."
        )


def _ranks(model: Any, config: LoraConfig) -> dict[str, int]:
    """Return the names of the layers that get an adapter, with their ranks."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    names = [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]
    pattern = config.rank_pattern
    return {name: pattern.get(get_pattern_key(pattern.keys(), name), config.r) for name in names}


def _start_loftq(model: Any, chosen: dict[str, int], *, has_values: bool) -> None:
    """Round the base of ``model`` and say what that cost."""
    if has_values:
        _log.warning("%s", round_base(model, bits=chosen["loftq_bits"], iterations=chosen["loftq_iter"]))
    # PEFT was told nothing of it: its own needs a package more and a GPU. A checkpoint of the run says how it started.
    model.peft_config["default"].init_lora_weights = "loftq"
    model.peft_config["default"].loftq_config = dict(chosen)


def refuse_beside_rounding(config: LoraConfig, *, rounds_base: bool = False) -> None:
    """Refuse an adapter that is no part of one weight, which is what a quantized layer has.

    Raises:
        AdapterError: dropout acts on the adapter alone, or the adapter is a variant of LoRA, or starts from a rounded
            base.
    """
    given = [name for name in ("lora_dropout", "use_dora", "lora_bias") if getattr(config, name, None)]
    given += ["loftq_config"] if rounds_base else []
    if given:
        raise AdapterError(
            f"qat_scheme with {' and '.join(given)}: base and adapter are rounded as one weight, of which this is no "
            "part. Leave it out."
        )


def continue_adapter(model: PeftModel, settings: AdapterSettings, asked: Iterable[str]) -> dict[str, Any]:
    """Make ``model`` with its loaded adapter ready to train on, and return the settings that the adapter has.

    ``asked`` names the settings that the user gave. How an adapter starts is past, so those are not looked at.

    Raises:
        SettingsError: a setting that was asked for differs from the adapter's own; all of them at once.
        SettingsError: see :func:`set_checkpointing`.
    """
    given = {name for name in asked if getattr(settings, name, None) is not None}
    given |= {"target_modules"} if given & set(FILTERS) else set()
    changes = [change for name, change in _changes(model, settings).items() if name in given]
    if changes:
        raise SettingsError(
            f"the model is an adapter already, and keeps its own settings when it is trained on ({', '.join(changes)})."
            " Leave these settings out, or train a new adapter on the base model."
        )
    set_checkpointing(model, settings.use_gradient_checkpointing)
    _set_location(model, settings.temporary_location)
    # Its layers_to_transform say the same.
    return {**(facts_of(model).adapter or {}), "finetune_last_n_layers": None}


# What each layer keeps until a plan says more; "unsloth" and "auto" are planned when the data are known.
_POLICIES = {
    False: Policy.NONE,
    True: Policy.FULL,
    "selective": Policy.SEL_MIN,
    "offload": Policy.OFFLOAD,
    "unsloth": Policy.SEL_MIN,
    "auto": Policy.SEL_MIN,
}


def check_checkpointing(mode: bool | str) -> None:
    """Refuse a ``use_gradient_checkpointing`` that is not there.

    Raises:
        SettingsError: anything that is not True, False, "auto", "unsloth", "selective" or "offload".
    """
    if not isinstance(mode, bool | str) or mode not in _POLICIES:
        names = [name for name in _POLICIES if isinstance(name, str)]
        raise SettingsError(
            f"use_gradient_checkpointing={mode!r}: allowed are True, False, {', '.join(map(repr, names))}."
            f"{did_you_mean(str(mode), names)}"
        )


def set_checkpointing(model: Any, mode: bool | str) -> None:
    """Choose what each decoder layer keeps for the backward pass; ``mode`` False keeps everything.

    Layers that the engine does not know recompute all or nothing, as transformers does. Where they cannot, "unsloth"
    and "auto" keep everything, which is noted.

    Raises:
        SettingsError: see :func:`check_checkpointing`; the mode needs the engine and it knows no layer of the model, or
            it is True and no layer can recompute.
    """
    check_checkpointing(mode)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    engine = engine_of(base)
    if mode in ("selective", "offload") and (engine is None or engine.plan.unknown):
        why = engine.plan.reasons[0] if engine is not None else "the engine is not installed on this model"
        raise SettingsError(
            f"use_gradient_checkpointing={mode!r} needs fused decoder layers ({why}). Use True, False or 'unsloth'."
        )
    if mode is not False and not base.supports_gradient_checkpointing:
        kind = type(base).__name__
        if mode is True:
            raise SettingsError(
                f"use_gradient_checkpointing=True: transformers has {kind} keep everything for the backward pass, and "
                "cannot compute its layers again. Leave it out."
            )
        note = f"layers of {kind} cannot be computed again: all is kept for the backward pass"
        facts_of(model).notes += [] if note in facts_of(model).notes else [note]
        mode = False
    checkpoint_layers(base, mode is not False)
    if engine is not None:
        engine.set_policy(_POLICIES[mode])
    facts_of(model).checkpointing = mode


def train_all_weights(
    model: Any,
    mode: bool | str,
    location: str | None = None,
    *,
    width: Width | None = None,
    qat_scheme: Any = None,
) -> None:
    """Let every weight of a loaded base take gradients; ``mode`` and ``location`` as in :class:`AdapterSettings`.

    ``width`` stores the linear layers of the decoder in 8 bits, or computes with them in 4 (``models/whole.py``);
    ``qat_scheme`` trains them for a scheme of torchao (``models/qat.py``).

    Raises:
        AdapterError: the model carries an adapter, or its files are quantized.
        ModelError: a package that ``width`` needs is not installed, or ``qat_scheme`` comes beside a ``width``.
        SettingsError: see :func:`set_checkpointing`.
    """
    if facts_of(model).width is not None or is_torchaos(model):
        raise AdapterError(
            f"full_finetuning=True needs a base in 16 or 32 bits; the files of {facts_of(model).name} are quantized."
        )
    if hasattr(model, "peft_config"):
        raise AdapterError(
            "full_finetuning=True trains the weights of a base, and this is an adapter. Name its base, or leave "
            "full_finetuning out to train the adapter on."
        )
    if width is not None:
        train_in(model, width)
    if qat_scheme is not None:
        prepare(model, qat_scheme)
    model.requires_grad_(True)
    facts_of(model).full_finetuning = True
    _set_location(model, location)
    set_checkpointing(model, mode)


def _set_location(model: Any, folder: str | None) -> None:
    """Choose where offloaded layer inputs go on a CPU; None leaves it to the system."""
    engine = engine_of(model)
    if engine is not None:
        engine.store.move_to(folder)
    elif folder is not None:
        raise SettingsError(
            f"temporary_location={folder!r} is where fused layers put their inputs, and the engine is not installed on "
            "this model. Leave it out, or load the model with from_pretrained."
        )


def trainable_share(model: Any) -> tuple[int, int]:
    """Return (trainable, all) parameter counts; quantized ones as what they stand for, shared ones once."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized = [module for module in model.modules() if is_quantized(module)]
    return trainable, total + sum(m.in_features * m.out_features - m.weight.numel() for m in quantized)


def _changes(model: PeftModel, settings: AdapterSettings, rows: PreparedData | None = None) -> dict[str, str]:
    """Return a phrase such as ``"r: 4 -> 8"`` for each setting in which ``settings`` differ from the model's adapter.

    Layers are compared as numbers, whichever of the two settings chose them.
    """
    base = model.get_base_model()
    with as_adapter_error(base):
        wanted = arguments_of(lora_config(base, settings))
    wanted.update(_start_of(settings, rows))
    own = facts_of(model).adapter or {}
    changes = {name: f"{name}: {value!r} -> {wanted[name]!r}" for name, value in own.items() if value != wanted[name]}
    if settings.finetune_last_n_layers is not None and "layers_to_transform" in changes:
        changes["finetune_last_n_layers"] = changes.pop("layers_to_transform")
    return changes


def _refuse_second(model: PeftModel, settings: AdapterSettings, rows: PreparedData | None) -> None:
    if facts_of(model).adapter is None:
        raise AdapterError(
            "the model already carries an adapter. Train it as it is, or add another: model.add_adapter(name, config)."
        )
    changes = _changes(model, settings, rows)
    if changes:
        raise AdapterError(
            f"the model already carries an adapter with other settings ({', '.join(changes.values())}). "
            "Load the base again, or add a second adapter with model.add_adapter(name, config)."
        )
