"""Export an adapter to GGUF alone, and try it in llama.cpp on the base that it was trained on."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.core.errors import SettingsError
from tunesmith.core.files import lasting_path, require_new, require_space, whole_folder
from tunesmith.export.gguf.check import reread_lora
from tunesmith.export.gguf.families import family_of, model_values, tensors_of
from tunesmith.export.gguf.lora import adapter_of, alpha_of, lora_header, lora_tensors, lora_weights
from tunesmith.export.gguf.methods import METHODS, Method
from tunesmith.export.gguf.runtime import ask_llama, has_llama
from tunesmith.export.gguf.save import GgufFile, GgufReport, kept_where_it_fails
from tunesmith.export.gguf.trial import Trial, refuse
from tunesmith.export.gguf.vocab import read_vocabulary
from tunesmith.export.gguf.write import kind_of, model_header, size_of, write_gguf
from tunesmith.export.verify import Reference, compared, reference_of

__all__ = ["save_lora_gguf"]

_METHODS = ("f32", "f16", "bf16")


def save_lora_gguf(
    model: Any, folder: Path, tokenizer: Any, *, method: str | None = None, prompts: Sequence[Any] = ()
) -> GgufReport:
    """Write the active adapter of ``model`` to ``<folder>/<its name>.LORA.<METHOD>.gguf``.

    It is read again and compared with what PEFT adds to each weight; where llama.cpp is installed, it is put there on
    the base and must answer as the live model does.

    Args:
        tokenizer: of the base, for the trial.
        method: "f32", "f16" or "bf16"; None: f32, since an adapter is small.
        prompts: texts or token ids to compare on, beside fixed texts.
    Raises:
        SettingsError: another method.
        AdapterError: there is not one adapter, or it has what a GGUF adapter cannot hold.
        OutputError: the folder is there already, cannot be written, or the disk has no room.
        ExportError: llama.cpp cannot hold the model, or the file differs from the adapter; it is kept as
            ``<folder>-failed``.
    """
    require_new(folder)
    if method is not None and method.lower() not in _METHODS:
        raise SettingsError(f"quantization_method={method!r}: a LoRA is stored as {', '.join(_METHODS)}.")
    start, how = time.perf_counter(), METHODS[(method or "f32").lower()]
    adapter, config = adapter_of(model), model.get_base_model().config
    arch, alpha = family_of(config).arch, alpha_of(model, adapter)
    tensors = list(lora_tensors(model, adapter))
    kinds = {tensor.name: kind_of(tensor, how, head="") for tensor in tensors}
    require_space(folder, size_of(tensors, kinds), "the GGUF adapter")
    reference = replace(reference_of(model, tokenizer, prompts), tokenizer=None)
    with whole_folder(folder) as temporary, kept_where_it_fails(folder, temporary):
        path = temporary / f"{folder.name}.LORA.{how.name.upper()}.gguf"
        write_gguf(path, arch, lora_header(folder.name, alpha), tensors, kinds)
        stored = reread_lora(path, arch, alpha, lora_weights(model, adapter))
        trial = _try(model, path, tokenizer, reference, how)
        file = GgufFile(f"lora {how.name}", lasting_path(path), path.stat().st_size, stored, trial)
        notes = ["llama.cpp puts it on a base that runs: llama-server -m BASE.gguf --lora FILE"]
        report = GgufReport(folder, [file], notes, time.perf_counter() - start)
        (temporary / "export_report.json").write_text(json.dumps(report.record(), indent=1) + "\n", encoding="utf-8")
    return report


def _try(model: Any, file: Path, tokenizer: Any, reference: Reference, method: Method) -> Trial:
    """Write the base, put the adapter on it in llama.cpp and compare that with the live model."""
    if not has_llama():
        return Trial(None, "llama-cpp-python is not installed: read again, and not run")
    config = model.get_base_model().config
    base = METHODS["f32" if reference.dtype == "float32" else "bf16"]
    values = model_values(config)[0]
    tensors = list(tensors_of(model, {}))
    vocabulary = read_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    kinds = {tensor.name: kind_of(tensor, base, head="") for tensor in tensors}
    with tempfile.TemporaryDirectory(prefix="tunesmith-", dir=file.parent) as place:
        whole = Path(place) / "base.gguf"
        require_space(whole, size_of(tensors, kinds), "the base to try the adapter on")
        write_gguf(whole, family_of(config).arch, model_header("base", values, vocabulary, base), tensors, kinds)
        found = compared(reference, ask_llama(whole, reference, adapter=file).answers, "llama.cpp")
    refuse(file, found, method.bar + reference.rounding)
    return Trial(found)
