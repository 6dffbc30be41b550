"""PEFT's config for the settings of an adapter, every name in it checked against the modules of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunesmith.adapters.parts import check_text_filters, filtered_targets, is_multimodal
from tunesmith.adapters.settings import AdapterSettings
from tunesmith.adapters.targets import check_patterns, expert_tensors, resolve_exclusions, resolve_targets
from tunesmith.core.errors import AdapterError, TunesmithError
from tunesmith.core.names import did_you_mean
from tunesmith.core.tasks import TASKS
from tunesmith.engine.host import is_on_host
from tunesmith.models.load import facts_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

__all__ = ["arguments_of", "as_adapter_error", "lora_config"]


def lora_config(model: PreTrainedModel, settings: AdapterSettings) -> LoraConfig:
    """Return PEFT's config for ``settings``, every name in it checked against the modules of ``model``."""
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    from tunesmith.engine.lora import fused_lora

    targets, layers = _targets(model, settings)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT declares int and computes with any number.
        lora_dropout=settings.lora_dropout,
        bias=settings.bias,
        target_modules=targets,
        target_parameters=settings.target_parameters,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        # loftq and eva start an adapter that is there already.
        init_lora_weights=True if settings.init_lora_weights in ("loftq", "eva") else settings.init_lora_weights,
        corda_config=CordaConfig() if settings.init_lora_weights == "corda" else None,
        lora_ga_config=LoraGAConfig() if settings.init_lora_weights == "lora_ga" else None,
        modules_to_save=_whole_modules(model, settings.modules_to_save),
        layers_to_transform=layers,
        layers_pattern=settings.layers_pattern,
        rank_pattern=settings.rank_pattern or {},
        alpha_pattern=settings.alpha_pattern or {},
        exclude_modules=_exclusions(model, settings.exclude_modules),
        ensure_weight_tying=settings.ensure_weight_tying,
        task_type=facts_of(model).task,
    )
    matched = [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]
    _check_names(settings, matched, layers)
    _check_tying(model, settings, matched)
    if settings.target_parameters:
        _check_expert_settings(settings)
        matched += expert_tensors(model, settings.target_parameters)
    # Without a target there is nothing that a pattern could match, and PEFT says why.
    if matched:
        check_patterns("rank_pattern", config.rank_pattern, matched)
        check_patterns("alpha_pattern", config.alpha_pattern, matched)
    return fused_lora(config)


def arguments_of(config: LoraConfig) -> dict[str, Any]:
    """Return the arguments of ``get_peft_model`` that give an adapter with this ``config``, but not how it started."""
    same = ("r", "lora_dropout", "bias", "use_rslora", "use_dora", "layers_pattern", "ensure_weight_tying")
    layers = config.layers_to_transform
    return {
        **{name: getattr(config, name) for name in same},
        # PEFT keeps 16 and 16.0 as they were given.
        "lora_alpha": float(config.lora_alpha),
        "target_modules": _sorted(config.target_modules),
        "target_parameters": _sorted(config.target_parameters) or None,
        # Tied ones PEFT adds by their whole name.
        "modules_to_save": sorted({name.rsplit(".", 1)[-1] for name in config.modules_to_save or ()}) or None,
        "exclude_modules": _sorted(config.exclude_modules),
        "layers_to_transform": [layers] if isinstance(layers, int) else layers and sorted(set(layers)),
        "rank_pattern": dict(config.rank_pattern) or None,
        "alpha_pattern": dict(config.alpha_pattern) or None,
    }


@contextmanager
def as_adapter_error(model: Any) -> Iterator[None]:
    """Turn what PEFT raises on settings that exclude each other or match nothing into one of ours."""
    try:
        yield
    except TunesmithError:
        raise
    except (ValueError, TypeError, re.error) as error:
        raise AdapterError(f"the adapter does not fit {type(model).__name__}: {error}") from error


def _targets(model: Any, settings: AdapterSettings) -> tuple[list[str] | str, list[int] | int | None]:
    """Return what PEFT gets as ``target_modules`` and ``layers_to_transform``."""
    layers = _layers(model, settings)
    is_for_experts_alone = settings.target_modules == [] and settings.target_parameters
    if not is_multimodal(model):
        check_text_filters(model, settings.filters)
        return [] if is_for_experts_alone else resolve_targets(model, settings.target_modules), layers
    layers = [layers] if isinstance(layers, int) else layers
    return filtered_targets(model, settings.target_modules, settings.filters, layers), None


def _check_expert_settings(settings: AdapterSettings) -> None:
    """Refuse with target_parameters what PEFT cannot do there, or would pass over in silence."""
    layers = settings.layers_to_transform is not None or settings.finetune_last_n_layers is not None
    problems = {
        "lora_dropout": (settings.lora_dropout > 0, "the adapter is added to the tensor before an input meets it"),
        "use_dora": (settings.use_dora, "PEFT has no DoRA for them"),
        "init_lora_weights": (
            settings.init_lora_weights not in (True, False, "gaussian"), "they start with true, false or gaussian"
        ),
        "layers_to_transform": (layers, "name the tensors of these layers in full, model.layers.0.mlp.experts..."),
    }  # fmt: skip
    for name, (is_given, reason) in problems.items():
        if is_given:
            raise AdapterError(f"{name} does not go with target_parameters: {reason}. Leave one of them out.")


def _sorted(names: set[str] | list[str] | str | None) -> list[str] | str | None:
    """PEFT keeps names as a set; sorted they compare and print the same each time."""
    return names if names is None or isinstance(names, str) else sorted(names)


def _whole_modules(model: Any, wanted: list[str] | None) -> list[str] | None:
    """Return what trains whole: what is asked for, the head of the task, and all else that the files did not hold."""
    facts = facts_of(model)
    heads = TASKS[facts.task].heads  # PEFT adds them too, both names of a classifier whichever is there
    return sorted({*(_checked_modules(model, wanted) or ()), *heads, *facts.new_modules}) or None


def _exclusions(model: Any, wanted: list[str] | str | None) -> list[str] | str | None:
    """Return the layers without an adapter: those asked for, and a pooler where no loss comes through it."""
    if wanted is None and facts_of(model).task == "FEATURE_EXTRACTION":
        poolers = [name for name, _ in model.named_modules() if name.endswith("pooler.dense")]
        return poolers or None
    return resolve_exclusions(model, wanted)


def _checked_modules(model: Any, wanted: list[str] | None) -> list[str] | None:
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}
    for name in wanted or ():
        if name not in names:
            raise AdapterError(
                f"modules_to_save {name!r} is no module of {type(model).__name__}.{did_you_mean(name, names)}"
            )
    if is_on_host(model.get_input_embeddings()) and "embed_tokens" in (wanted or ()):
        raise AdapterError(
            "modules_to_save 'embed_tokens': offload_embedding keeps the embedding frozen in host memory. Leave one of "
            "them out."
        )
    return wanted


def _check_names(settings: AdapterSettings, targets: list[str], layers: list[int] | int | None) -> None:
    """Refuse names that PEFT adapts in layers that were left out, or does not adapt since they train whole."""
    asked = settings.target_modules if isinstance(settings.target_modules, list) else []
    chosen = {layers} if isinstance(layers, int) else set(layers or ())
    for name in asked:
        number = re.search(r"\.(\d+)\.", name)
        if layers is not None and name in targets and number is not None and int(number[1]) not in chosen:
            raise AdapterError(f"target_modules {name!r} is in no layer of those that were chosen: {sorted(chosen)}.")
        if name in (settings.modules_to_save or ()):
            raise AdapterError(
                f"{name!r} is in target_modules and in modules_to_save, which trains it whole, without an adapter. "
                "Name it in one of them."
            )


def _check_tying(model: Any, settings: AdapterSettings, targets: list[str]) -> None:
    """Refuse settings that would part embedding and output head in silence, or keep together what is apart.

    ``targets`` are the modules that get an adapter.
    """
    own = (model.get_input_embeddings(), model.get_output_embeddings())
    is_tied = bool(model.config.tie_word_embeddings) and own[1] is not None
    names = [name.rsplit(".", 1)[-1] for name, module in model.named_modules() if any(module is end for end in own)]
    ends = {"embed_tokens", "lm_head", *names}
    whole, adapted = ends & set(settings.modules_to_save or ()), ends & {name.rsplit(".", 1)[-1] for name in targets}
    keeps = "embed_tokens" in names  # PEFT knows no other name
    keep = "Give ensure_weight_tying=True to keep them one, or " if keeps else "Leave it out, or "
    way = (
        "Train it whole: modules_to_save=['embed_tokens'] with ensure_weight_tying=True." if keeps else "Leave it out."
    )
    if settings.ensure_weight_tying and is_tied and not keeps:
        raise AdapterError(
            "ensure_weight_tying=True is kept only where the embedding is called embed_tokens, and here it is "
            f"{names[0]}. Name {' and '.join(names)} in modules_to_save to let them part, or leave them out."
        )
    if is_tied and adapted:
        raise AdapterError(
            f"target_modules {sorted(adapted)}: embedding and output head of this model are one tensor, and an adapter "
            f"on it cannot be merged. {way}"
        )
    if is_tied and len(whole) == 1 and not settings.ensure_weight_tying:
        raise AdapterError(
            f"modules_to_save {sorted(whole)}: embedding and output head of this model are one tensor, and training "
            f"one copy would part them. {keep}name both to let them part."
        )
    if (settings.takes_from_base or settings.rounds_base or settings.needs_rows) and adapted:
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
