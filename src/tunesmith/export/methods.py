"""The export methods that Unsloth's users call on a model, and one door for all methods of export."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.errors import NotSupportedYetError, SettingsError
from tunesmith.core.names import did_you_mean
from tunesmith.export.adapter import export_adapter
from tunesmith.export.form import MERGE_METHODS
from tunesmith.export.merge import merge_model
from tunesmith.export.report import ExportReport
from tunesmith.export.torchao import save_torchao

__all__ = ["METHODS", "check_method", "export_model", "with_exports"]

METHODS = (*MERGE_METHODS, "lora")
"""How a model can be exported."""


def check_method(method: str) -> str:
    """Return the method in its own letters.

    Raises:
        SettingsError: there is none of that name.
    """
    if method.lower() not in METHODS:
        raise SettingsError(f"save_method={method!r}: use {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    return method.lower()


def export_model(model: Any, folder: Path, tokenizer: Any = None, *, method: str, **how: Any) -> ExportReport:
    """Export ``model`` by a method of :data:`METHODS`; ``how`` as in the function for it."""
    if check_method(method) == "lora":
        return export_adapter(model, folder, tokenizer, **how)
    return merge_model(model, folder, tokenizer, method=check_method(method), **how)


def with_exports(model: Any) -> Any:
    """Return ``model`` with :func:`save_merged` and :func:`tunesmith.export.torchao.save_torchao` as methods.

    On this instance alone: the classes of transformers and PEFT stay as they are.
    """
    model.save_pretrained_merged = types.MethodType(save_merged, model)
    model.save_pretrained_torchao = types.MethodType(save_torchao, model)
    return model


def save_merged(
    model: Any,
    save_directory: Any,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    adapters: Mapping[str, float] | None = None,
    prompts: Sequence[str] = (),
    push_to_hub: bool = False,
) -> ExportReport:
    """Write a folder that transformers (or, with "lora", PEFT) loads, and compare it with this model.

    Args:
        save_method: "merged_16bit", "merged_32bit" or "lora" (the adapter alone), in any case of letters.
        adapters: name -> share of each adapter that is merged; None: the active ones in full.
        prompts: texts to compare on, beside fixed ones.
        push_to_hub: not supported yet.
    Raises: see :func:`tunesmith.export.merge.merge_model` and :func:`tunesmith.export.adapter.export_adapter`.
    """
    if push_to_hub:
        raise NotSupportedYetError("push_to_hub=True is not supported yet. Leave it out and upload the folder.")
    merging = {} if adapters is None else {"adapters": adapters}
    folder = Path(save_directory).expanduser()
    return export_model(model, folder, tokenizer, method=save_method, prompts=prompts, **merging)
