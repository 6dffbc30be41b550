"""How an export stores weights: all cast to 16 or 32 bits, or the linear layers of the decoder in NF4 and others cast.

NF4 is written as transformers and bitsandbytes write it themselves: codes under the name of the weight, what they mean
beside them, and a ``quantization_config`` in config.json.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.core.errors import ModelError
from tunesmith.export.weights import MergedWeight
from tunesmith.models.load import facts_of
from tunesmith.models.quantize import is_four_bit, make_quantized, nf4_tensors, quantization_config
from tunesmith.models.vision import has_vision, outside_decoder

__all__ = ["MERGE_METHODS", "Form", "form_of"]

MERGE_METHODS = {"merged_16bit": 1e-3, "merged_32bit": 1e-6, "merged_4bit": 1.0}
"""Method -> the mean KL divergence (nats a token) between live model and export above which the export has failed.

What NF4 costs depends on the model, and SmolLM2-135M loses much: 0.40 against the model in 16 bits, 0.08 against one
that was trained on an NF4 base. A broken export is several nats away, and training that was lost is told by the share
of it that is left (``report.py``), which was 98 % and more there.
"""

_NF4_BYTES = 0.52  # of a weight: 4 bits, and its share of the scales


@dataclass(frozen=True, slots=True)
class Form:
    """How weights are stored.

    Attributes:
        dtype: of what is not quantized.
        four_bit: names of the weights that are stored in NF4.
        quantization: the config by which transformers reads them, None where there are none.
    """

    dtype: torch.dtype
    four_bit: frozenset[str] = frozenset()
    quantization: Any = None

    def __str__(self) -> str:
        """Return the name of the number format."""
        return "NF4" if self.four_bit else str(self.dtype).removeprefix("torch.")

    def bytes_of(self, weight: MergedWeight) -> int:
        """Return the bytes that a weight will take, a little more in NF4."""
        width = _NF4_BYTES if weight.name in self.four_bit else self.dtype.itemsize if weight.is_float else 8
        return math.ceil(math.prod(weight.shape) * width)

    def stored(self, weight: MergedWeight) -> dict[str, torch.Tensor]:
        """Make a weight and return the tensors that it is stored as, by name, on the CPU."""
        made = weight.make()
        if weight.name in self.four_bit:
            return nf4_tensors(weight.name, made.to(torch.float32), self.dtype)
        # A copy: a view would keep the file of the base, or tie two entries of a shard.
        dtype = self.dtype if weight.is_float else made.dtype
        return {weight.name: made.to("cpu", dtype, copy=True).contiguous()}


def form_of(model: Any, method: str) -> Form:
    """Return how ``method`` stores the weights of ``model``, a PEFT model or a plain one.

    Raises:
        ModelError: bitsandbytes, which NF4 needs, is not installed, or the model has no layer for it.
    """
    if method == "merged_32bit":
        return Form(torch.float32)
    own = facts_of(model).dtype.dtype
    dtype = own if own.itemsize == 2 else torch.bfloat16
    if method == "merged_16bit":
        return Form(dtype)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    leave_out = outside_decoder(config) if has_vision(config) else None
    # transformers itself says which layers it would read in 4 bits.
    with torch.device("meta"):
        empty = type(base)(config)
        make_quantized(empty, "4bit", dtype, leave_out=leave_out)
    names = frozenset(f"{name}.weight" for name, layer in empty.named_modules() if is_four_bit(layer))
    if not names:
        raise ModelError(f"save_method='merged_4bit': {type(base).__name__} has no linear layer that can be 4 bits.")
    return Form(dtype, names, quantization_config("4bit", dtype, leave_out=leave_out))
