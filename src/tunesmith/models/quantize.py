"""Loading a base in fewer bits, and what protects it once it is there.

Only linear layers inside the decoder are quantized; embedding, head and norms keep their dtype. Training reads the
weights through ``ops/quantized``, see ``engine/layer.py``.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ModelError
from tunesmith.core.memory import forget_pages, trim_heap
from tunesmith.core.versions import installed
from tunesmith.engine.float8 import store_in_float8, why_no_products
from tunesmith.engine.read import is_quantized, read_quantized
from tunesmith.models.settings import Width, asked_by, is_float8
from tunesmith.ops.quantized import quantized_linear

if TYPE_CHECKING:
    import torch

__all__ = [
    "float8_notes",
    "is_four_bit",
    "is_misread",
    "keep_activations",
    "make_quantized",
    "nf4_tensors",
    "protect_gradients",
    "quantization_config",
    "quantize_nf4",
    "reading_once",
    "to_float8",
    "width_of",
]


def quantization_config(width: Width, dtype: torch.dtype, *, leave_out: list[str] | None = None) -> Any:
    """Return the config by which transformers quantizes while it loads, computing in ``dtype``.

    ``leave_out`` names modules that keep their dtype; None: the output head.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if installed("bitsandbytes") is None:
        raise ModelError(f"{asked_by(width)} needs the package bitsandbytes. Install it: pip install bitsandbytes")
    if width == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=leave_out)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=leave_out,
    )


_TRIMMED = 2**28
"""Bytes of weights after whose quantization the holes that they left in the heap are given back."""


def reading_once(packs: Width | None) -> AbstractContextManager[Any]:
    """Return a context in which weights that are quantized one by one leave nothing of themselves behind.

    transformers maps weight files into memory until the last weight is loaded: without this the whole file is in this
    process beside the quantized weights, and what quantizing needs for a moment stays as holes in the heap. Does
    nothing without ``packs``, the width.
    """
    if packs is None:
        return nullcontext()
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class ReadingOnce(TorchDispatchMode):
        read = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            weight = args[0] if args else None
            has_read = func.namespace == "bitsandbytes" or func is torch.ops.aten._to_copy.default
            if has_read and isinstance(weight, torch.Tensor) and weight.device.type == "cpu":
                forget_pages([(weight.data_ptr(), weight.nbytes)])
                self.read += weight.nbytes
                if self.read > _TRIMMED:
                    trim_heap()
                    self.read = 0
            return result

    return ReadingOnce()


def make_quantized(model: Any, width: Width, dtype: torch.dtype, *, leave_out: list[str] | None = None) -> None:
    """Put the layers of bitsandbytes where transformers would, or ours in float8, into a model without values."""
    if is_float8(width):
        to_float8(model, width, leave_out=leave_out)
        return
    from transformers.quantizers import AutoHfQuantizer

    config = quantization_config(width, dtype, leave_out=leave_out)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    model.config.quantization_config = config


def to_float8(
    model: Any, width: Width, *, leave_out: list[str] | None = None, device: torch.device | None = None
) -> None:
    """Store the linear layers that ``load_in_8bit`` would store, one by one, in float8 on ``device``.

    ``leave_out`` names modules that keep their dtype with all that they hold; the output head does too. Saving the
    whole model is refused from then on: its files would be read without the scales.
    """
    from torch import nn

    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        is_outside = any(name == part or name.startswith(f"{part}.") for part in leave_out or ())
        if type(layer) is nn.Linear and layer is not head and not is_outside:
            store_in_float8(layer, by_block=width == "fp8-block", device=device)
    model.save_pretrained = _refuse_saving


def float8_notes(model: Any, width: Width | None, *, is_fused: bool) -> list[str]:
    """Return a line for the banner that says how a base in float8 is stored and multiplied; none for other widths."""
    if not is_float8(width):
        return []
    scales = "row" if width == "fp8" else "block of 128 by 128"
    dtype = model.get_input_embeddings().weight.dtype
    reason = why_no_products(model, dtype=dtype) if is_fused else "decoder layers run as transformers wrote them"
    products = f"in {str(dtype).removeprefix('torch.')}: {reason}"
    if reason is None:
        products = "of training steps in float8, their inputs rounded token by token"
    return [f"linear layers of the decoder: float8 e4m3, a scale a {scales}; products {products}"]


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise ModelError(
        "a base in float8 is not saved: its files are those that it was loaded from. Save the adapter that is trained "
        "on it, or the merged model with save_pretrained_merged."
    )


def is_four_bit(module: Any) -> bool:
    """Return whether ``module`` is a 4-bit layer of bitsandbytes."""
    return is_quantized(module) and hasattr(module, "quant_state")


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return codes and ``QuantState`` of a weight, as bitsandbytes makes them when it loads it."""
    import bitsandbytes.functional

    return bitsandbytes.functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )


def nf4_tensors(name: str, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors that a folder holds for the weight ``name`` in NF4; read again, it has ``dtype``."""
    codes, state = quantize_nf4(weight)
    state.dtype = dtype
    parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {key: value.to("cpu", copy=True) for key, value in {name: codes, **parts}.items()}


def width_of(config: Any) -> Width | None:
    """Return the width in which bitsandbytes stored the weights of a folder, from its config, or None."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    known = stored if isinstance(stored, dict) else stored.to_dict()
    return "4bit" if known.get("load_in_4bit") else "8bit" if known.get("load_in_8bit") else None


def is_misread(module: Any) -> bool:
    """Return whether bitsandbytes reads the weight of a 4-bit layer wrongly here; see :func:`protect_gradients`."""
    import torch

    if not is_four_bit(module) or module.weight.device.type != "cpu":
        return False
    ends_within = module.in_features % module.weight.blocksize != 0
    return ends_within and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def protect_gradients(model: Any) -> None:
    """Keep the 4-bit layers of ``model`` in the one layout that has a backward.

    On processors with AVX512-BF16 bitsandbytes turns a weight into a layout for generation in its first evaluation, and
    every gradient after it is silently wrong (cosine to the true one 0.04). On those with AVX512 it also reads a weight
    wrongly whose rows end within a block (in bitsandbytes 0.50.2): such layers read theirs as the engine does.

    Raises:
        ModelError: a weight has the layout for generation already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if is_misread(module):
            module.__class__ = _dense_class("Linear4bit")
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ModelError(
                f"the 4-bit weight {name} has the layout that bitsandbytes makes for generation, whose gradients are "
                "wrong. Load the model again with FastLanguageModel.from_pretrained before anything is generated."
            )


def keep_activations(model: Any) -> None:
    """Make the 8-bit layers of ``model`` compute with activations as they are, in training and in generation alike.

    bitsandbytes rounds the activations to 8 bits too (and says so thousands of times); here only weights are stored so.
    """
    for module in model.modules():
        if is_quantized(module) and hasattr(module, "state"):
            module.__class__ = _dense_class("Linear8bitLt")


@functools.cache
def _dense_class(name: str) -> type:
    """Return a class for layers of bitsandbytes of that ``name``, whose weights are read as what they stand for."""
    import bitsandbytes

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Return (..., F) in the dtype of ``x`` (..., D)."""
        weight = read_quantized(self)
        if isinstance(weight, str):
            raise ModelError(f"{weight}. Load the model with FastLanguageModel.from_pretrained.")
        return quantized_linear(x, weight, self.bias)

    return type(name, (getattr(bitsandbytes.nn, name),), {"forward": forward, "__module__": __name__})
