"""Put a LoRA adapter on a loaded model: targets checked, A seeded, checkpointing set."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunesmith.adapters.model import as_adapter_model, refuse_quantized
from tunesmith.adapters.parts import check_text_filters, filtered_targets, is_multimodal
from tunesmith.adapters.settings import FILTERS, AdapterSettings
from tunesmith.adapters.targets import check_patterns, resolve_exclusions, resolve_targets
from tunesmith.core.errors import AdapterError, SettingsError
from tunesmith.core.names import did_you_mean
from tunesmith.core.versions import checkpoint_layers
from tunesmith.engine.install import engine_of
from tunesmith.engine.policies import Policy
from tunesmith.engine.read import is_quantized
from tunesmith.models.load import facts_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "arguments_of",
    "check_checkpointing",
    "continue_adapter",
    "inject_adapter",
    "set_checkpointing",
    "train_all_weights",
    "trainable_share",
]

# How a new adapter starts: no property of one that is there already.
_STARTS = ("random_state", "init_lora_weights")


def inject_adapter(model: PreTrainedModel | PeftModel, settings: AdapterSettings) -> PeftModel:
    """Return ``model`` with a new trainable LoRA adapter; A and B are float32, whatever the base is.

    A model that already carries an adapter with the same settings keeps it, and only its checkpointing is set.

    Raises:
        AdapterError: a target or pattern matches nothing, layers are asked for that do not exist, settings exclude
            each other, or the model already has an adapter with other settings.
        SettingsError: see :func:`set_checkpointing`.
        OutputError: ``temporary_location`` is a file or cannot be written.
    """
    from peft import PeftModel, get_peft_model

    check_checkpointing(settings.use_gradient_checkpointing)
    _set_location(model, settings.temporary_location)
    facts = facts_of(model)
    if isinstance(model, PeftModel):
        _refuse_second(model, settings)
        set_checkpointing(model, settings.use_gradient_checkpointing)
        return model
    if settings.takes_from_base:
        refuse_quantized(model)
    with _as_adapter_error(model):
        config = _lora_config(model, settings)
        has_values = not model.get_input_embeddings().weight.is_meta
        if not has_values:
            config.init_lora_weights = True  # shapes alone are wanted
        with _seeded(settings.random_state):
            adapted = get_peft_model(model, config)
    as_adapter_model(adapted, takes_from_base=settings.takes_from_base and has_values)
    facts.adapter = {**arguments_of(config), **{name: getattr(settings, name) for name in _STARTS}}
    adapted.tunesmith_facts = facts
    set_checkpointing(adapted, settings.use_gradient_checkpointing)
    return adapted


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


def arguments_of(config: LoraConfig) -> dict[str, Any]:
    """Return the arguments of ``get_peft_model`` that give an adapter with this ``config``, but not how it started."""
    same = ("r", "lora_dropout", "bias", "use_rslora", "use_dora", "layers_pattern", "ensure_weight_tying")
    layers = config.layers_to_transform
    return {
        **{name: getattr(config, name) for name in same},
        # PEFT keeps 16 and 16.0 as they were given.
        "lora_alpha": float(config.lora_alpha),
        "target_modules": _sorted(config.target_modules),
        # Tied ones PEFT adds by their whole name.
        "modules_to_save": sorted({name.rsplit(".", 1)[-1] for name in config.modules_to_save or ()}) or None,
        "exclude_modules": _sorted(config.exclude_modules),
        "layers_to_transform": [layers] if isinstance(layers, int) else layers,
        "rank_pattern": dict(config.rank_pattern) or None,
        "alpha_pattern": dict(config.alpha_pattern) or None,
    }


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
    if mode not in _POLICIES or not isinstance(mode, bool | str):
        names = [name for name in _POLICIES if isinstance(name, str)]
        raise SettingsError(
            f"use_gradient_checkpointing={mode!r}: allowed are True, False, {', '.join(map(repr, names))}."
            f"{did_you_mean(str(mode), names)}"
        )


def set_checkpointing(model: Any, mode: bool | str) -> None:
    """Choose what each decoder layer keeps for the backward pass; ``mode`` False keeps everything.

    Layers that the engine does not know recompute all or nothing, as transformers does.

    Raises:
        SettingsError: see :func:`check_checkpointing`; or the mode needs the engine and it knows no layer of the model.
    """
    check_checkpointing(mode)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    engine = engine_of(base)
    if mode in ("selective", "offload") and (engine is None or engine.plan.unknown):
        why = engine.plan.reasons[0] if engine is not None else "the engine is not installed on this model"
        raise SettingsError(
            f"use_gradient_checkpointing={mode!r} needs fused decoder layers ({why}). Use True, False or 'unsloth'."
        )
    checkpoint_layers(base, mode is not False)
    if engine is not None:
        engine.set_policy(_POLICIES[mode])
    facts_of(model).checkpointing = mode


def train_all_weights(model: Any, mode: bool | str, location: str | None = None) -> None:
    """Let every weight of a loaded base take gradients; ``mode`` and ``location`` as in :class:`AdapterSettings`.

    Raises:
        AdapterError: the model carries an adapter, or its files are quantized.
        SettingsError: see :func:`set_checkpointing`.
    """
    if facts_of(model).width is not None:
        raise AdapterError(
            f"full_finetuning=True needs a base in 16 or 32 bits; the files of {facts_of(model).name} are quantized."
        )
    if hasattr(model, "peft_config"):
        raise AdapterError(
            "full_finetuning=True trains the weights of a base, and this is an adapter. Name its base, or leave "
            "full_finetuning out to train the adapter on."
        )
    model.requires_grad_(True)
    facts_of(model).full_finetuning = True
    _set_location(model, location)
    set_checkpointing(model, mode)


def _set_location(model: Any, folder: str | None) -> None:
    """Choose where offloaded layer inputs go on a CPU; None leaves it to the system."""
    engine = engine_of(model)
    if engine is not None:
        engine.store.move_to(folder)


def trainable_share(model: Any) -> tuple[int, int]:
    """Return (trainable, all) parameter counts; quantized ones as what they stand for, shared ones once."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized = [module for module in model.modules() if is_quantized(module)]
    return trainable, total + sum(m.in_features * m.out_features - m.weight.numel() for m in quantized)


def _lora_config(model: PreTrainedModel, settings: AdapterSettings) -> LoraConfig:
    """Return PEFT's config for ``settings``, every name in it checked against the modules of ``model``."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    from tunesmith.engine.lora import fused_lora

    targets, layers = _targets(model, settings)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT declares int and computes with any number.
        lora_dropout=settings.lora_dropout,
        bias=settings.bias,
        target_modules=targets,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights,
        modules_to_save=_checked_modules(model, settings.modules_to_save),
        layers_to_transform=layers,
        layers_pattern=settings.layers_pattern,
        rank_pattern=settings.rank_pattern or {},
        alpha_pattern=settings.alpha_pattern or {},
        exclude_modules=resolve_exclusions(model, settings.exclude_modules),
        ensure_weight_tying=settings.ensure_weight_tying,
        task_type="CAUSAL_LM",
    )
    matched = [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]
    _check_tying(model, settings, matched)
    # Without a target there is nothing that a pattern could match, and PEFT says why.
    if matched:
        check_patterns("rank_pattern", config.rank_pattern, matched)
        check_patterns("alpha_pattern", config.alpha_pattern, matched)
    return fused_lora(config)


def _targets(model: Any, settings: AdapterSettings) -> tuple[list[str] | str, list[int] | int | None]:
    """Return what PEFT gets as ``target_modules`` and ``layers_to_transform``."""
    layers = _layers(model, settings)
    if not is_multimodal(model):
        check_text_filters(model, settings.filters)
        return resolve_targets(model, settings.target_modules), layers
    layers = [layers] if isinstance(layers, int) else layers
    return filtered_targets(model, settings.target_modules, settings.filters, layers), None


@contextmanager
def _as_adapter_error(model: Any) -> Iterator[None]:
    """Turn what PEFT raises on settings that exclude each other or match nothing into one of ours."""
    try:
        yield
    except AdapterError:
        raise
    except (ValueError, TypeError, re.error) as error:
        raise AdapterError(f"the adapter does not fit {type(model).__name__}: {error}") from error


def _changes(model: PeftModel, settings: AdapterSettings) -> dict[str, str]:
    """Return a phrase such as ``"r: 4 -> 8"`` for each setting in which ``settings`` differ from the model's adapter.

    Layers are compared as numbers, whichever of the two settings chose them.
    """
    base = model.get_base_model()
    with _as_adapter_error(base):
        wanted = arguments_of(_lora_config(base, settings))
    wanted.update({name: getattr(settings, name) for name in _STARTS})
    own = facts_of(model).adapter or {}
    changes = {name: f"{name}: {value!r} -> {wanted[name]!r}" for name, value in own.items() if value != wanted[name]}
    if settings.finetune_last_n_layers is not None and "layers_to_transform" in changes:
        changes["finetune_last_n_layers"] = changes.pop("layers_to_transform")
    return changes


def _refuse_second(model: PeftModel, settings: AdapterSettings) -> None:
    if facts_of(model).adapter is None:
        raise AdapterError(
            "the model already carries an adapter. Train it as it is, or add another: model.add_adapter(name, config)."
        )
    changes = _changes(model, settings)
    if changes:
        raise AdapterError(
            f"the model already carries an adapter with other settings ({', '.join(changes.values())}). "
            "Load the base again, or add a second adapter with model.add_adapter(name, config)."
        )


def _sorted(names: set[str] | list[str] | str | None) -> list[str] | str | None:
    """PEFT keeps names as a set; sorted they compare and print the same each time."""
    return names if names is None or isinstance(names, str) else sorted(names)


def _checked_modules(model: Any, wanted: list[str] | None) -> list[str] | None:
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}
    for name in wanted or ():
        if name not in names:
            raise AdapterError(
                f"modules_to_save {name!r} is no module of {type(model).__name__}.{did_you_mean(name, names)}"
            )
    return wanted


def _check_tying(model: Any, settings: AdapterSettings, targets: list[str]) -> None:
    """Refuse settings that would part embedding and output head in silence, or keep together what is apart.

    ``targets`` are the modules that get an adapter.
    """
    is_tied = bool(model.config.tie_word_embeddings)
    ends = {"embed_tokens", "lm_head"}
    whole, adapted = ends & set(settings.modules_to_save or ()), ends & {name.rsplit(".", 1)[-1] for name in targets}
    if is_tied and adapted:
        raise AdapterError(
            f"target_modules {sorted(adapted)}: embedding and output head of this model are one tensor, and an adapter "
            "on it cannot be merged. Train it whole: modules_to_save=['embed_tokens'] with ensure_weight_tying=True."
        )
    if is_tied and len(whole) == 1 and not settings.ensure_weight_tying:
        raise AdapterError(
            f"modules_to_save {sorted(whole)}: embedding and output head of this model are one tensor, and training "
            "one copy would part them. Give ensure_weight_tying=True to keep them one, or name both to let them part."
        )
    if settings.takes_from_base and adapted:
        raise AdapterError(
            f"init_lora_weights={settings.init_lora_weights!r} with target_modules {sorted(adapted)}: embeddings and "
            "heads do not start in this way. Leave them out of target_modules."
        )
    if settings.ensure_weight_tying and not (is_tied and whole):
        why = "no embedding is in modules_to_save" if is_tied else "this model has two tensors for them"
        raise AdapterError(f"ensure_weight_tying=True keeps embedding and output head one tensor, but {why}.")


def _layers(model: Any, settings: AdapterSettings) -> list[int] | int | None:
    count = model.config.get_text_config().num_hidden_layers
    last, chosen = settings.finetune_last_n_layers, settings.layers_to_transform
    if last is not None and chosen is not None:
        raise AdapterError("finetune_last_n_layers and layers_to_transform both choose layers. Give one of them.")
    if last is not None:
        if last > count:
            raise AdapterError(f"finetune_last_n_layers={last}, but the model has {count} layers.")
        return list(range(count - last, count))
    outside = [index for index in ([chosen] if isinstance(chosen, int) else chosen or []) if not 0 <= index < count]
    if outside:
        raise AdapterError(f"layers_to_transform {outside}: the model has layers 0 to {count - 1}.")
    return chosen


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and random for the block and give them back their states."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
