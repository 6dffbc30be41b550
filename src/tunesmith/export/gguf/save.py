"""Export a model to GGUF: one file for each method, a Modelfile, and a report of how near each is to the live model.

    merged weights ── families.py, vocab.py ──> f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0      write.py, no compiler needed
                                     └──> 16 or 32 bits ── llama.cpp ──> K- and I-quants    quantize.py, a process
    each file ── check.py ──> every tensor and value as in the live model
         └────── runtime.py ──> llama.cpp: KL divergence, tokens, prompts

Without llama.cpp, transformers loads the file where it knows everything in it; the report says what did.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ExportError, SettingsError
from tunesmith.core.files import lasting_path, require_new, require_space, whole_folder
from tunesmith.export.gguf.check import Reread, reread
from tunesmith.export.gguf.methods import METHODS, Method, gguf_methods
from tunesmith.export.gguf.quantize import check_imatrix, quantize_file
from tunesmith.export.gguf.runtime import INSTALL, has_llama
from tunesmith.export.gguf.source import Source, read_source
from tunesmith.export.gguf.trial import Trial, try_file
from tunesmith.export.gguf.write import model_header, write_gguf
from tunesmith.export.modelfile import modelfile, read_turns
from tunesmith.models.load import facts_of

__all__ = ["GgufFile", "GgufReport", "kept_where_it_fails", "save_gguf"]

_FIRST = ("f32", "bf16", "f16")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One file and how near to the live model it is.

    Attributes:
        method: how it was asked to be stored.
        path: where it lies.
        size: its bytes.
        stored: how its tensors really are stored, and how far they are from the live ones.
        trial: what a runtime made of it.
    """

    method: str
    path: Path
    size: int
    stored: Reread
    trial: Trial

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"method": self.method, "file": self.path.name, "bytes": self.size, "tensors": self.stored.kinds,
                "largest_relative_error": self.stored.error, **self.trial.record()}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufReport:
    """What was written.

    Attributes:
        folder: where it lies.
        files: one for each method.
        notes: what the user should know.
        seconds: for writing and comparing.
        url: where it was uploaded, None where it was not.
    """

    folder: Path
    files: list[GgufFile]
    notes: list[str]
    seconds: float
    url: str | None = None

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"format": "gguf", "files": [file.record() for file in self.files], "notes": self.notes,
                "seconds": self.seconds}  # fmt: skip


def save_gguf(
    model: Any,
    folder: Path,
    tokenizer: Any,
    *,
    methods: str | Sequence[str] = "fast_quantized",
    first: str | None = None,
    imatrix: Path | None = None,
    adapters: Mapping[str, float] | None = None,
    prompts: Sequence[Any] = (),
) -> GgufReport:
    """Write ``model`` with its adapters merged to ``<folder>/<its name>.<METHOD>.gguf`` and compare it with the model.

    Args:
        model: a PEFT model or a plain one; it is not changed.
        tokenizer: goes into the file, which holds no model without one.
        methods: one name or several of :data:`tunesmith.export.gguf.methods.METHODS`, or aliases.
        first: "f32", "bf16" or "f16": what llama.cpp quantizes from; None: f32 for a float32 model, else bf16.
        imatrix: importance matrix of ``llama-imatrix``, for what llama.cpp quantizes.
        adapters: name -> share of each adapter that is merged; None: the active ones in full.
        prompts: texts or token ids to compare on, beside fixed texts.
    Raises:
        SettingsError: an unknown method, or one that needs an importance matrix.
        AdapterError: something that no plain weight can hold.
        OutputError: the folder is there already, cannot be written, or the disk has no room.
        ExportError: llama.cpp cannot hold this model, is missing for a method, or a file differs from the live model;
            then it is kept as ``<folder>-failed``.
    """
    require_new(folder)
    start = time.perf_counter()
    wanted = gguf_methods(methods, dtype=_dtype_name(model), imatrix=imatrix is not None)
    base = _first(first, wanted, imatrix, _dtype_name(model))
    source = read_source(model, tokenizer, adapters, prompts)
    made = [*wanted, *([base] if base is not None and base not in wanted else [])]
    require_space(folder, sum(source.bytes(method) for method in made), "the GGUF export")
    with whole_folder(folder) as temporary, kept_where_it_fails(folder, temporary):
        paths = _write(source, temporary, folder.name, wanted, base, imatrix)
        files = [_checked(source, method, path) for method, path in paths.items()]
        turns = read_turns(tokenizer)
        notes = [*source.notes, *([f"no TEMPLATE in the Modelfile: {turns}"] if isinstance(turns, str) else [])]
        bos = tokenizer.bos_token if source.vocabulary.adds_bos else None
        stops = [tokenizer.convert_ids_to_tokens(index) for index in source.vocabulary.stops]
        text = modelfile([path.name for path in paths.values()], turns, bos=bos, stops=stops)
        (temporary / "Modelfile").write_text(text, encoding="utf-8")
        report = GgufReport(folder, files, notes, time.perf_counter() - start)
        (temporary / "export_report.json").write_text(json.dumps(report.record(), indent=1) + "\n", encoding="utf-8")
    return report


def _dtype_name(model: Any) -> str:
    return str(facts_of(model).dtype.dtype).removeprefix("torch.")


def _first(asked: str | None, wanted: Sequence[Method], imatrix: Path | None, dtype: str) -> Method | None:
    """Return what llama.cpp quantizes from; None where it has nothing to do.

    Raises:
        SettingsError: ``asked`` or ``imatrix`` has no effect, or is unusable.
        ExportError: llama.cpp is not there.
    """
    by_llama = [method.name for method in wanted if not method.is_native]
    if asked is not None and asked.lower() not in _FIRST:
        raise SettingsError(f"first_conversion={asked!r}: use {', '.join(_FIRST)}.")
    for name, given in (("first_conversion", asked), ("imatrix_file", imatrix)):
        if given is not None and not by_llama:
            raise SettingsError(f"{name} is for K- and I-quants, and none is asked for. Leave it out.")
    if imatrix is not None:
        check_imatrix(imatrix)
    if by_llama and not has_llama():
        raise ExportError(f"{by_llama[0]} is made by llama.cpp. {INSTALL}. q8_0, q5_1 and q4_1 need no llama.cpp.")
    if not by_llama:
        return None
    return METHODS[asked.lower() if asked else "f32" if dtype == "float32" else "bf16"]


def _write_native(source: Source, path: Path, name: str, method: Method) -> None:
    """Write one file without llama.cpp."""
    header = model_header(name, source.values, source.vocabulary, method)
    write_gguf(path, source.arch, header, source.tensors, source.kinds(method))


def _write(
    source: Source, folder: Path, name: str, wanted: Sequence[Method], base: Method | None, imatrix: Path | None
) -> dict[Method, Path]:
    """Write the files and return where they are, in the order in which they were asked for."""
    paths = {method: folder / f"{name}.{method.name.upper()}.gguf" for method in wanted}
    for method, path in paths.items():
        if method.is_native:
            _write_native(source, path, name, method)
    if base is not None:
        whole = paths.get(base, folder / ".first.gguf")
        if base not in paths:
            _write_native(source, whole, name, base)
        for method, path in paths.items():
            if not method.is_native:
                quantize_file(whole, path, method, imatrix)
        if base not in paths:
            whole.unlink()
    return paths


def _checked(source: Source, method: Method, path: Path) -> GgufFile:
    """Compare one file with the live model."""
    stored = reread(path, source)
    trial = try_file(path, source, bar=method.bar)
    return GgufFile(method.name, lasting_path(path), path.stat().st_size, stored, trial)


@contextlib.contextmanager
def kept_where_it_fails(folder: Path, temporary: Path) -> Generator[None]:
    """Keep ``temporary`` under a name that says so where the block ends with an :class:`ExportError`."""
    try:
        yield
    except ExportError as error:
        failed = folder.with_name(f"{folder.name}-failed")
        shutil.rmtree(failed, ignore_errors=True)
        temporary.rename(failed)
        raise ExportError(f"{error}. It is kept as {failed}.") from error
