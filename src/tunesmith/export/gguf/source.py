"""What all GGUF files of a model are made of and compared with, read from it once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gguf import GGMLQuantizationType as Kind

from tunesmith.core.errors import AdapterError, ExportError
from tunesmith.export.gguf.families import Tensor, family_of, model_values, tensors_of
from tunesmith.export.gguf.methods import METHODS, Method
from tunesmith.export.gguf.vocab import Vocabulary, read_vocabulary
from tunesmith.export.gguf.write import kind_of, size_of
from tunesmith.export.verify import Reference, reference_of
from tunesmith.export.weights import adapter_shares
from tunesmith.models.load import facts_of

__all__ = ["Source", "read_source"]


@dataclass(frozen=True, slots=True)
class Source:
    """A live model, read once for all files that are made of it.

    Attributes:
        tensors: of a file, made when they are asked for.
        arch, values: what llama.cpp is told of the model.
        vocabulary: what it is told of the tokenizer.
        reference: what the live model answers to probes.
        notes: what the user should know.
    """

    model: Any
    tokenizer: Any
    tensors: list[Tensor]
    arch: str
    values: dict[str, Any]
    vocabulary: Vocabulary
    reference: Reference
    notes: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        """Name of the tensor that makes the logits."""
        names = {tensor.name for tensor in self.tensors}
        return "output.weight" if "output.weight" in names else "token_embd.weight"

    def kinds(self, method: Method) -> dict[str, Kind]:
        """Return how each tensor is stored by a method that needs no llama.cpp."""
        return {tensor.name: kind_of(tensor, method, self.head) for tensor in self.tensors}

    def bytes(self, method: Method) -> int:
        """Return about how many bytes a file has."""
        if method.is_native:
            return size_of(self.tensors, self.kinds(method))
        return self.bytes(METHODS["q8_0"])  # more than any that llama.cpp makes


def read_source(model: Any, tokenizer: Any, adapters: Mapping[str, float] | None, prompts: Sequence[Any]) -> Source:
    """Return what all files are made of, the answers of the live model among it.

    Raises: see :func:`tunesmith.export.gguf.save.save_gguf`.
    """
    trained_in = facts_of(model).trained_in
    if trained_in is not None:
        raise AdapterError(f"all weights of this model were trained in {trained_in}: GGUF is not made of them.")
    if tokenizer is None:
        raise ExportError("a GGUF file holds the tokenizer too: give it as the second argument.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = family_of(base.config)
    values, notes = model_values(base.config)
    rows = base.get_input_embeddings().weight.shape[0]
    values["vocab_size"] = rows
    stops = getattr(base.generation_config, "eos_token_id", None)
    tensors = list(tensors_of(model, adapter_shares(model, adapters)))
    vocabulary = read_vocabulary(tokenizer, rows, stops)
    # The tokenizer in a GGUF file is compared in another way than one in a folder.
    reference = replace(reference_of(model, tokenizer, prompts), tokenizer=None)
    return Source(model, tokenizer, tensors, family.arch, values, vocabulary, reference,
                  [*notes, *vocabulary.notes])  # fmt: skip
