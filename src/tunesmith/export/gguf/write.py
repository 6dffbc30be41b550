"""Write a GGUF file, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from tunesmith.core.errors import ExportError
from tunesmith.export.gguf.families import Tensor
from tunesmith.export.gguf.methods import Method
from tunesmith.export.gguf.vocab import Vocabulary

__all__ = ["kind_of", "model_header", "size_of", "write_gguf"]

_LARGEST_F16 = 65504.0
_STORED = {"q4_0": Kind.Q4_0, "q4_1": Kind.Q4_1, "q5_0": Kind.Q5_0, "q5_1": Kind.Q5_1, "q8_0": Kind.Q8_0,
           "f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16}  # fmt: skip


def kind_of(tensor: Tensor, method: Method, head: str) -> Kind:
    """Return how a tensor is stored: vectors whole; matrices as ``method`` says, the output head with 8 bits at least.

    A row that is no multiple of a block is stored in float16, as llama.cpp does it.

    Args:
        head: name of the tensor that makes the logits.
    """
    kind = _STORED[method.name]
    if len(tensor.shape) < 2:
        return Kind.F32
    if tensor.name == head and kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1):
        kind = Kind.Q8_0
    return Kind.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def size_of(tensors: Sequence[Tensor], kinds: Mapping[str, Kind]) -> int:
    """Return the bytes that ``tensors`` have in a file."""
    return sum(_bytes_of(tensor.shape, kinds[tensor.name]) for tensor in tensors)


def _bytes_of(shape: Sequence[int], kind: Kind) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


Header = Callable[[gguf.GGUFWriter], None]


def write_gguf(path: Path, arch: str, header: Header, tensors: Sequence[Tensor], kinds: Mapping[str, Kind]) -> None:
    """Write ``tensors`` as ``kinds`` says by name, behind what ``header`` adds.

    Raises:
        ExportError: a value that a kind cannot hold.
    """
    writer = gguf.GGUFWriter(path, arch)
    header(writer)
    for tensor in tensors:
        kind = kinds[tensor.name]
        size = _bytes_of(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        values = tensor.make()
        if kinds[tensor.name] == Kind.F16 and np.abs(values).max(initial=0.0) > _LARGEST_F16:
            raise ExportError(f"{tensor.name} has values above {_LARGEST_F16:g}, and f16 cannot hold them: use bf16")
        writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(values), kinds[tensor.name]))
    writer.close()


def model_header(name: str, values: Mapping[str, Any], vocabulary: Vocabulary | None, method: Method) -> Header:
    """Return what writes the values of a model and its tokenizer.

    Args:
        values: of :func:`tunesmith.export.gguf.families.model_values`.
    """

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_type("model")
        # llama.cpp knows tokens that swallow white space behind them by the name of the model alone.
        is_odd = vocabulary is not None and vocabulary.strips_right and writer.arch == "phi3"
        writer.add_name(f"phi-3 {name}" if is_odd and "phi-3" not in name.lower() else name)
        writer.add_file_type(method.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in values.items():
            _add(writer, f"{writer.arch}.{key}", value)
        if vocabulary is not None:
            _add_vocabulary(writer, vocabulary)

    return write


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_uint32(key, int(value))


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.cut is not None:
        writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    for name, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
