"""A model for commands that answer rather than train: a base, a trained run, or a base with an adapter beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.adapters.state import attach_adapter
from tunesmith.api import FastLanguageModel
from tunesmith.cli.console import silence_libraries
from tunesmith.core.errors import AdapterError
from tunesmith.models.aliases import find_model
from tunesmith.models.load import load_tokenizer

__all__ = ["load_for_answers"]


def load_for_answers(
    model: str, adapter: str | None = None, *, chat_template: str | None = None, dtype: str | None = None
) -> tuple[Any, Any]:
    """Return (model, tokenizer), ready to generate, with the libraries below silenced.

    Raises:
        ModelError: nothing usable is at ``model``.
        AdapterError: ``adapter`` is no adapter, does not fit, or ``model`` has one already.
    """
    # Names are looked up first: a mistyped one is said at once, not after the seconds that the libraries take.
    base = find_model(model)
    source = None if adapter is None else find_model(adapter)
    if source is not None and source.kind != "adapter":
        raise AdapterError(f"--adapter {adapter} is no adapter: it holds no adapter_config.json. Give a run's folder.")
    if source is not None and base.kind == "adapter":
        raise AdapterError(f"--model {model} already is an adapter on its base. Leave out --adapter, or name the base.")
    silence_libraries()
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        model, max_seq_length=None, dtype=dtype, chat_template=chat_template, use_gradient_checkpointing=False
    )
    if source is not None:
        loaded = attach_adapter(loaded, Path(source.path), trainable=False)
        if (Path(source.path) / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(source, chat_template=chat_template)
    return FastLanguageModel.for_inference(loaded), tokenizer
