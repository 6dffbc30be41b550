"""The model of a run: loaded as the settings say, with an adapter on it or all of its weights in training."""

from __future__ import annotations

from typing import Any

from tunesmith.adapters.inject import check_checkpointing, continue_adapter, inject_adapter, train_all_weights
from tunesmith.adapters.rows import as_rows
from tunesmith.adapters.settings import AdapterSettings
from tunesmith.adapters.state import load_source
from tunesmith.core.device import dtype_to_train
from tunesmith.models.heads import Head
from tunesmith.models.load import DEFAULT_WINDOW, facts_of
from tunesmith.models.qat import refuse_other_scheme
from tunesmith.training.settings import RunSettings

__all__ = ["load_for_run", "source_arguments", "source_window"]


def load_for_run(settings: RunSettings, head: Head) -> tuple[Any, Any, RunSettings]:
    """Return model, tokenizer and the settings, in which an adapter that is trained on stands as it is.

    A vision-language model comes with its processor in place of a tokenizer.
    """
    check_checkpointing(settings.use_gradient_checkpointing)
    model, tokenizer = load_source(
        settings.model,
        chat_template=settings.chat_template,
        head=head,
        with_processor=True,
        **source_arguments(settings),
    )
    if settings.full_finetuning:
        mode, scheme = settings.use_gradient_checkpointing, settings.qat_scheme
        train_all_weights(model, mode, settings.temporary_location, width=settings.width, qat_scheme=scheme)
        return model, tokenizer, settings
    wanted: AdapterSettings = settings.part(AdapterSettings)
    if facts_of(model).adapter is None:
        rows = None
        if settings.init_data is not None:
            rows = as_rows(model, settings.init_data, mapping=settings.map, train_on=settings.train_on)
        return inject_adapter(model, wanted, rows, qat_scheme=settings.qat_scheme), tokenizer, settings
    refuse_other_scheme(model, settings.qat_scheme)
    own = continue_adapter(model, wanted, settings.model_fields_set)
    return model, tokenizer, settings.replace(**own)


def source_window(settings: RunSettings) -> dict[str, Any]:
    """Return what says where a model comes from and how long its window is, as arguments of ``load_source*``."""
    window = settings.max_seq_length or settings.max_length
    hub = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code or None}
    return {
        "max_seq_length": window or DEFAULT_WINDOW,
        "stretched": settings.stretched(window),
        **{name: value for name, value in hub.items() if value is not None},
    }


def source_arguments(settings: RunSettings) -> dict[str, Any]:
    """Return what ``load_source`` and ``empty_source`` are told alike."""
    return {
        **source_window(settings),
        "dtype": dtype_to_train(settings.dtype) if settings.full_finetuning else settings.dtype,
        "width": None if settings.full_finetuning else settings.width,
        "whole": settings.load_in_16bit,
        "vocabulary": settings.resize_model_vocab,
        "offload_embedding": settings.offload_embedding,
        "attn_implementation": settings.attn_implementation,
    }
