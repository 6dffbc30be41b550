"""A PEFT model with the export methods that Unsloth's users call on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.adapters.model import CausalAdapter
from tunesmith.core.errors import NotSupportedYetError, SettingsError
from tunesmith.core.names import did_you_mean
from tunesmith.export.adapter import export_adapter
from tunesmith.export.merge import MERGE_METHODS, ExportReport, merge_model

__all__ = ["METHODS", "ExportingModel", "as_exporting", "check_method", "export_model"]

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


def as_exporting(model: Any) -> Any:
    """Return ``model``; from now on a causal one with an adapter of ours has the methods of :class:`ExportingModel`."""
    if type(model) is CausalAdapter:
        model.__class__ = ExportingModel
    return model


class ExportingModel(CausalAdapter):
    """See the module."""

    def save_pretrained_merged(
        self,
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
        return export_model(self, folder, tokenizer, method=save_method, prompts=prompts, **merging)
