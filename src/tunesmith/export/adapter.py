"""Write an adapter folder and compare it, loaded by plain PEFT, with the live model.

Adapters whose base was quantized, stretched or grown, or lies beside them, are loaded by this library, which reads
``base.json``: plain PEFT would put them on another base than they were trained on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.adapters.model import base_bytes_beside
from tunesmith.core.errors import AdapterError
from tunesmith.core.files import require_new, whole_folder
from tunesmith.export.card import About
from tunesmith.export.report import ExportReport, write_report
from tunesmith.export.verify import compare, reference_of
from tunesmith.models.load import facts_of

__all__ = ["ADAPTER_BAR", "export_adapter"]

ADAPTER_BAR = 1e-6
"""Mean KL divergence in nats above which an adapter folder has failed: nothing in it is rounded."""

_NOTHING = About()


def export_adapter(
    model: Any, folder: Path, tokenizer: Any = None, *, prompts: Sequence[Any] = (), about: About = _NOTHING
) -> ExportReport:
    """Write the adapter of ``model`` to ``folder`` and compare what PEFT loads from it with the live model.

    Where another adapter than "default" is active, it stands in the folder alone, as an adapter by itself does.

    Args: see :func:`tunesmith.export.merge.merge_model`.
    Raises:
        AdapterError: the model carries no adapter, or several are active.
        OutputError: the folder is there already or cannot be written.
        ExportError: what was saved answers otherwise than the live model; it is kept as ``<folder>-failed``.
    """
    if not hasattr(model, "peft_config"):
        raise AdapterError("save_method='lora' saves an adapter, and this model carries none. Use 'merged_16bit'.")
    active = list(model.active_adapters)
    if len(active) != 1:
        raise AdapterError(
            f"save_method='lora' saves one adapter, and {len(active)} are active on this model. Choose one with "
            "set_adapter, or merge them."
        )
    require_new(folder)
    start, facts = time.perf_counter(), facts_of(model)
    is_plain = facts.width is None and facts.stretch is None and facts.vocabulary is None
    runtime = "peft" if is_plain and not base_bytes_beside(model) else "tunesmith"
    reference = reference_of(model, tokenizer, prompts)
    with whole_folder(folder) as temporary:
        is_default = active == ["default"]
        model.save_pretrained(temporary, selected_adapters=None if is_default else active)
        if not is_default:  # PEFT gives others a folder below
            for file in (temporary / active[0]).iterdir():
                file.replace(temporary / file.name)
            (temporary / active[0]).rmdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        size = sum(file.stat().st_size for file in temporary.rglob("adapter_model.safetensors"))
        found = compare(reference, temporary, runtime=runtime)
        report = ExportReport(folder, "lora", "adapter", size, "float32", time.perf_counter() - start,
                              {"adapter": found}, reference.moved)  # fmt: skip
        write_report(report, temporary, ADAPTER_BAR + reference.rounding, base=facts.name, about=about)
    return report
