"""Put a LoRA adapter on a loaded model: targets checked, A seeded, checkpointing set."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunesmith.adapters.settings import AdapterSettings
from tunesmith.adapters.targets import resolve_targets
from tunesmith.core.errors import AdapterError
from tunesmith.core.names import did_you_mean
from tunesmith.core.versions import checkpoint_layers
from tunesmith.models.load import facts_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["inject_adapter", "set_checkpointing", "trainable_share"]


def inject_adapter(model: PreTrainedModel | PeftModel, settings: AdapterSettings) -> PeftModel:
    """Return ``model`` with a new trainable LoRA adapter; A and B are float32, whatever the base is.

    A model that already carries an adapter is returned as it is when the settings are the same.

    Raises:
        AdapterError: a target matches nothing, layers are asked for that do not exist, or the model already has an
            adapter with other settings.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    from tunesmith.engine.lora import fused_lora

    arguments = settings.arguments()
    facts = facts_of(model)
    if isinstance(model, PeftModel):
        _refuse_second(facts.adapter, arguments)
        return model
    targets = resolve_targets(model, settings.target_modules)
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
        layers_to_transform=_layers(model, settings),
        layers_pattern=settings.layers_pattern,
        rank_pattern=settings.rank_pattern or {},
        alpha_pattern=settings.alpha_pattern or {},
        exclude_modules=settings.exclude_modules,
        task_type="CAUSAL_LM",
    )
    with _seeded(settings.random_state):
        try:
            adapted = get_peft_model(model, fused_lora(config))
        except ValueError as error:
            raise AdapterError(f"the adapter does not fit {type(model).__name__}: {error}") from error
    facts.adapter = arguments
    adapted.tunesmith_facts = facts
    set_checkpointing(adapted, settings.use_gradient_checkpointing)
    return adapted


def set_checkpointing(model: Any, mode: bool | str) -> None:
    """Recompute each decoder layer in the backward pass, or keep everything (``mode`` False)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    checkpoint_layers(base, mode is not False)
    facts_of(model).checkpointing = mode is not False


def trainable_share(model: Any) -> tuple[int, int]:
    """Return (trainable, all) parameter counts; shared tensors count once."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in model.parameters())


def _refuse_second(first: dict[str, Any] | None, second: dict[str, Any]) -> None:
    if first is None:
        raise AdapterError(
            "the model already carries an adapter. Train it as it is, or add another: model.add_adapter(name, config)."
        )
    different = [name for name, value in second.items() if first[name] != value]
    if different:
        changes = ", ".join(f"{name}: {first[name]!r} -> {second[name]!r}" for name in different)
        raise AdapterError(
            f"the model already carries an adapter with other settings ({changes}). "
            "Load the base again, or add a second adapter with model.add_adapter(name, config)."
        )


def _checked_modules(model: Any, wanted: list[str] | None) -> list[str] | None:
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}
    for name in wanted or ():
        if name not in names:
            raise AdapterError(
                f"modules_to_save {name!r} is no module of {type(model).__name__}.{did_you_mean(name, names)}"
            )
    tied = model.config.get_text_config().tie_word_embeddings and {"embed_tokens", "lm_head"} & set(wanted or ())
    if tied:
        raise AdapterError(
            f"modules_to_save {sorted(tied)}: embedding and output head of this model are one tensor, and training one "
            "copy would part them. ensure_weight_tying is not supported yet; leave them out."
        )
    return wanted


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
