"""Read a GGUF file again and compare everything in it with the live model: no runtime is needed for that.

Each tensor is written out and set against the weight that it was made of; values, tokens, merges, special tokens and
the chat template must come back as they are in the live model. What a runtime makes of the file, ``runtime.py`` asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from tunesmith.core.errors import ExportError
from tunesmith.export.gguf.families import Tensor
from tunesmith.export.gguf.source import Source

__all__ = ["Reread", "reread", "reread_lora"]

# Largest root mean square of the rounding, as a share of that of the weights: about three times what normal weights
# give. Other rows, another scale or a missing permutation are all above 0.5.
_LARGEST = {
    Kind.F32: 0.0, Kind.F16: 2e-3, Kind.BF16: 5e-3, Kind.Q8_0: 0.02, Kind.Q6_K: 0.06, Kind.Q5_K: 0.12, Kind.Q5_0: 0.15,
    Kind.Q5_1: 0.15, Kind.Q4_K: 0.25, Kind.Q4_0: 0.3, Kind.Q4_1: 0.3, Kind.IQ4_NL: 0.25, Kind.IQ4_XS: 0.25,
}  # fmt: skip
_COARSE = 0.5  # of two and three bits
_LARGEST_LORA = 0.01  # bfloat16 in both matrices


@dataclass(frozen=True, slots=True)
class Reread:
    """What a file holds.

    Attributes:
        kinds: how many tensors are stored in which way, the most frequent first.
        error: largest relative error of a tensor, by kind.
    """

    kinds: dict[str, int]
    error: dict[str, float]


def reread(file: Path, source: Source) -> Reread:
    """Compare everything in ``file`` with what it was made of.

    Raises:
        ExportError: something is missing, foreign, another, or further from its weight than rounding explains.
    """
    reader = gguf.GGUFReader(file)
    _compare_values(file.name, reader, source)
    return _compare_tensors(file.name, reader, source.tensors)


def _compare_tensors(file: str, reader: gguf.GGUFReader, tensors: Iterable[Tensor]) -> Reread:
    """Compare each tensor with what it was made of.

    Raises:
        ExportError: one is missing, foreign, of another shape, or further from its weight than rounding explains.
    """
    stored = {tensor.name: tensor for tensor in reader.tensors}
    kinds: Counter[str] = Counter()
    errors: dict[str, float] = {}
    for tensor in tensors:
        found = stored.pop(tensor.name, None)
        if found is None or tuple(int(length) for length in reversed(found.shape)) != tensor.shape:
            raise ExportError(f"{file} has no tensor {tensor.name} of shape {tensor.shape}")
        error = _error(found, tensor.make())
        kind = found.tensor_type.name
        if not error <= _LARGEST.get(found.tensor_type, _COARSE):
            raise ExportError(f"{tensor.name} in {file} ({kind}) is off by {error:.2g} of its size")
        kinds[kind] += 1
        errors[kind] = max(error, errors.get(kind, 0.0))
    if stored:
        raise ExportError(f"{file} has tensors that the model has not: {', '.join(sorted(stored)[:3])}")
    return Reread(dict(kinds.most_common()), errors)


def _error(stored: Any, weight: np.ndarray) -> float:
    return _share(gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(weight.shape) - weight, weight)


def reread_lora(file: Path, arch: str, alpha: float, added: Mapping[str, np.ndarray]) -> Reread:
    """Compare what an adapter file adds to each weight, as llama.cpp computes it, with ``added``.

    Raises:
        ExportError: they differ.
    """
    reader = gguf.GGUFReader(file)
    wanted = {"general.type": "adapter", "general.architecture": arch, "adapter.type": "lora"}
    if any(reader.fields[key].contents() != value for key, value in wanted.items()):
        raise ExportError(f"{file.name} does not say that it is a LoRA for {arch}")
    if reader.fields["adapter.lora.alpha"].contents() != np.float32(alpha):
        raise ExportError(f"{file.name} has another alpha than the adapter")
    stored = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    if stored.keys() != {f"{name}.lora_{side}" for name in added for side in "ab"}:
        raise ExportError(f"{file.name} adapts other weights than the adapter")
    largest = 0.0
    for name, weight in added.items():
        a, b = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
        error = _share(alpha / len(a) * (b @ a) - weight, weight)
        if not error <= _LARGEST_LORA:
            raise ExportError(f"{name} in {file.name} adds what is off by {error:.2g} of its size")
        largest = max(largest, error)
    return Reread(dict(kinds.most_common()), {"product": largest})


def _share(difference: np.ndarray, weight: np.ndarray) -> float:
    """Return the root mean square of a difference, as a share of that of the weight."""
    size, off = float(np.linalg.norm(weight.ravel())), float(np.linalg.norm(difference.ravel()))
    return off / size if size else off


def _compare_values(file: str, reader: gguf.GGUFReader, source: Source) -> None:
    """Compare what a file says of the model and its tokenizer with what it should.

    Raises:
        ExportError: they differ; the message names the key.
    """
    fields, arch, vocabulary = reader.fields, source.arch, source.vocabulary
    wanted: dict[str, Any] = {"general.architecture": arch}
    wanted |= {f"{arch}.{key}": value for key, value in source.values.items()}
    wanted |= {f"tokenizer.ggml.{name}_token_id": index for name, index in vocabulary.special.items()}
    wanted |= {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.cut,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.kinds,
        "tokenizer.ggml.merges": vocabulary.merges or None,
        "tokenizer.ggml.scores": vocabulary.scores or None,
        "tokenizer.ggml.add_bos_token": vocabulary.adds_bos,
        "tokenizer.ggml.add_eos_token": vocabulary.adds_eos,
        "tokenizer.chat_template": vocabulary.template or None,
    }
    for key, value in wanted.items():
        found = fields[key].contents() if key in fields else None
        is_same = np.float32(value) == np.float32(found or 0) if isinstance(value, float) else found == value
        if not is_same:
            raise ExportError(f"{file} has another {key} than the model")
