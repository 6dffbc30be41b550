"""K-quants and I-quants, made by llama.cpp in a process of its own from a file in 16 or 32 bits.

An importance matrix is read from the GGUF files that ``llama-imatrix`` writes: for each weight the sum of the squares
of what came into it, and how often; llama.cpp is given their quotient.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tunesmith.core.errors import ExportError, SettingsError
from tunesmith.export.gguf.methods import METHODS, Method
from tunesmith.export.gguf.runtime import INSTALL, has_llama, run_python

__all__ = ["check_imatrix", "quantize_file"]

_SUMS, _COUNTS = ".in_sum2", ".counts"


def quantize_file(source: Path, target: Path, method: Method, imatrix: Path | None = None) -> None:
    """Write ``source`` (f32, f16 or bf16) to ``target`` as ``method`` says.

    Raises:
        ExportError: llama.cpp is not there, or cannot do it.
    """
    import torch

    if not has_llama():
        raise ExportError(f"{method.name} is made by llama.cpp. {INSTALL}. q8_0, q5_1 and q4_1 need no llama.cpp.")
    run_python(__name__, f"llama.cpp cannot write {method.name}", str(source), str(target), method.name,
               str(imatrix or ""), str(torch.get_num_threads()))  # fmt: skip


def check_imatrix(file: Path) -> None:
    """Refuse a file that is no importance matrix.

    Raises:
        SettingsError: it is not there, or is no GGUF file that llama-imatrix writes.
    """
    if not file.is_file():
        raise SettingsError(f"imatrix_file={str(file)!r} is not there.")
    with file.open("rb") as opened:
        is_gguf = opened.read(4) == b"GGUF"
    if not is_gguf or not _importance(file):
        raise SettingsError(f"imatrix_file={str(file)!r} is no importance matrix in GGUF. Make one with llama-imatrix.")


def _importance(file: Path) -> dict[str, np.ndarray]:
    """Return weight -> importance of each of its columns, float32."""
    stored = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in gguf.GGUFReader(file).tensors}
    return {
        name.removesuffix(_SUMS): (sums / np.maximum(stored[name.removesuffix(_SUMS) + _COUNTS], 1).reshape(-1, 1))
        .ravel()
        .astype(np.float32)
        for name, sums in stored.items()
        if name.endswith(_SUMS) and name.removesuffix(_SUMS) + _COUNTS in stored
    }


def _quantize(source: str, target: str, name: str, imatrix: str, threads: str) -> None:
    import llama_cpp

    api: Any = llama_cpp  # its annotations know no ctypes.byref
    how = llama_cpp.llama_model_quantize_default_params()
    how.nthread, how.ftype = int(threads), METHODS[name].file_type
    if imatrix:
        found = _importance(Path(imatrix))
        kind = llama_cpp.llama_model_imatrix_data
        pointer = ctypes.POINTER(ctypes.c_float)
        entries = [kind(key.encode(), value.ctypes.data_as(pointer), value.size) for key, value in found.items()]
        listed = (kind * (len(entries) + 1))(*entries)  # an entry without a name ends it
        how.imatrix = ctypes.cast(listed, ctypes.POINTER(kind))
    llama_cpp.llama_backend_init()
    if api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(how)) != 0:
        raise RuntimeError("llama_model_quantize failed")


if __name__ == "__main__":
    _quantize(*sys.argv[1:])
