"""From modules to numbers: what one projection or norm of a layer is in this call, PEFT's adapter included.

Read anew in every call, so that whatever PEFT does in between (adapters added, switched, disabled, merged) is seen.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from tunesmith.engine.float8 import Float8Linear
from tunesmith.ops.lora_linear.cpu import Projection
from tunesmith.ops.quantized.weights import EightBitWeight, FourBitWeight, Nested, QuantizedWeight

__all__ = [
    "four_bit_weight",
    "hooked",
    "is_quantized",
    "quantized_bytes",
    "read_blocks",
    "read_norm",
    "read_projection",
    "read_quantized",
    "unreadable",
]


def read_projection(module: Any, *, training: bool) -> Projection | str:
    """Return the linear layer with its active adapter, or the reason why it is more than that."""
    if type(module) is torch.nn.Linear or is_quantized(module):
        return _read_base(module)
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer

    base = module.get_base_layer() if isinstance(module, LoraLayer) else None
    # PEFT has classes of its own for quantized layers, with the same adapters.
    if not isinstance(module, LoraLinear) and not is_quantized(base):
        return f"a layer is a {type(module).__name__}"
    if type(base) is not torch.nn.Linear and not is_quantized(base):
        return f"the base of an adapter is a {type(base).__name__}"
    plain = hooked(base) or _read_base(base)
    if isinstance(plain, str):
        return plain
    if module.merged and module.disable_adapters:
        return "a merged adapter is disabled"  # PEFT's own forward takes it out of the weight first
    if module.merged or module.disable_adapters:
        return plain
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return plain
    if len(names) > 1:
        return f"{len(names)} adapters are active at once"
    (name,) = names
    if name in module.lora_variant:
        return f"the adapter is a variant of LoRA ({type(module.lora_variant[name]).__name__})"
    if module.lora_bias[name]:
        return "lora_B has a bias"
    drop = module.lora_dropout[name]
    found = hooked(drop, module.lora_A[name], module.lora_B[name])
    if found:
        return found
    if type(drop) not in (torch.nn.Identity, torch.nn.Dropout) or getattr(drop, "p", 0) == 1:
        return f"lora_dropout is {drop}"
    dropout = float(drop.p) if training and drop.training and isinstance(drop, torch.nn.Dropout) else 0.0
    return replace(
        plain,
        a=module.lora_A[name].weight,
        b=module.lora_B[name].weight,
        scale=float(module.scaling[name]),
        dropout=dropout,
    )


def is_quantized(module: Any) -> bool:
    """Return whether ``module`` is a linear layer of bitsandbytes, in 4 or 8 bits, or one of ours in float8."""
    if isinstance(module, Float8Linear):
        return True
    known = sys.modules.get("bitsandbytes")  # where it was never imported, there is none
    return known is not None and isinstance(module, (known.nn.Linear4bit, known.nn.Linear8bitLt))


def unreadable(module: Any) -> str | None:
    """Return the reason why a projection never is a linear layer that :func:`read_projection` reads, from its type."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if is_quantized(base):
        return None
    if type(base) is not torch.nn.Linear:
        return f"a layer is a {type(base).__name__}"
    kind = type(base.weight)
    return None if kind in (torch.nn.Parameter, torch.Tensor) else f"a weight is a {kind.__name__}"


def _read_base(module: Any) -> Projection | str:
    """Return a linear layer without its adapter, or the reason why it is more than that."""
    weight, bias = module.weight, module.bias
    if not is_quantized(module):
        return _special(weight) or Projection(weight, bias)
    if weight.is_meta:
        return "a weight is not in memory"
    found = read_quantized(module)
    if isinstance(found, str):
        return found
    # Only its shape is read: the values come from ``quantized``.
    place = torch.empty(found.shape, device="meta", dtype=torch.float32 if bias is None else bias.dtype)
    return Projection(place, bias, quantized=found)


def read_quantized(module: Any) -> QuantizedWeight | str:
    """Return the weight of a quantized layer, or the reason why it cannot be read."""
    if isinstance(module, Float8Linear):
        return module.stored
    return _four_bits(module) if hasattr(module.weight, "quant_state") else _eight_bits(module)


def quantized_bytes(module: Any) -> int:
    """Return the bytes of a layer's quantized weight with its scales, also where it is not in memory yet."""
    if isinstance(module, Float8Linear):
        return module.weight.nbytes + module.scales.nbytes
    found = "a weight is not in memory" if module.weight.is_meta else read_quantized(module)
    if isinstance(found, EightBitWeight):
        return found.codes.nbytes + found.scales.nbytes
    if isinstance(found, FourBitWeight):
        return found.codes.nbytes + found.scales.nbytes + (0 if found.nested is None else found.nested.scales.nbytes)
    entries = module.in_features * module.out_features
    if not hasattr(module.weight, "quant_state"):
        return entries + 4 * module.out_features
    # NF4 with double quantization: a byte of scale for 64 entries, a float32 for 256 of those.
    return entries // 2 + entries // 64 + 4 * (entries // (64 * 256) + 1)


def _four_bits(module: Any) -> FourBitWeight | str:
    weight = module.weight
    state = weight.quant_state if weight.quant_state is not None else module.quant_state
    if state is None:
        return "a 4-bit layer has not been quantized yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "a 4-bit weight has the layout in which bitsandbytes generates on AVX512 processors"
    return four_bit_weight(weight.data, state)


def four_bit_weight(codes: torch.Tensor, state: Any) -> FourBitWeight:
    """Return what ``quantize_4bit`` of bitsandbytes made of a matrix: its codes and its ``QuantState``."""
    second = state.state2
    nested = None if second is None else Nested(second.code, second.absmax, second.blocksize, state.offset)
    rows, columns = state.shape
    packed = codes.view(torch.uint8)
    return FourBitWeight(packed, state.code, state.absmax, state.blocksize, (rows, columns), state.quant_type, nested)


def _eight_bits(module: Any) -> EightBitWeight | str:
    weight = module.weight
    # bitsandbytes moves the scales from the Parameter to the module in its first forward.
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    if weight.dtype != torch.int8 or scales is None:
        return "an 8-bit layer has not been quantized yet"
    return EightBitWeight(weight.data, scales)


def read_norm(module: Any) -> torch.Tensor | str:
    """Return the weight of an RMSNorm module, or the reason why it is something else."""
    if not type(module).__name__.endswith("RMSNorm"):
        return f"a norm is a {type(module).__name__}"
    return module.weight


def read_blocks(layer: Any) -> str | None:
    """Return the reason why a layer's blocks, and what they consist of, have to run as modules, or None."""
    blocks = list(layer.children())
    if _hooks_of_all():
        return "hooks of all modules are set"
    return hooked(*blocks, *(part for block in blocks for part in block.children()))


def _hooks_of_all() -> bool:
    own = torch.nn.modules.module
    return bool(
        own._global_forward_hooks or own._global_forward_pre_hooks
        or own._global_backward_hooks or own._global_backward_pre_hooks
    )  # fmt: skip


def hooked(*modules: Any) -> str | None:
    """Return a reason where someone watches or changes what a module computes, which the fused layer would pass by."""
    for module in modules:
        own = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        own += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        if "forward" in module.__dict__ or not all(map(_is_asleep, own)):
            return f"a {type(module).__name__} inside the layer has hooks"
    return None


def _is_asleep(hook: Any) -> bool:
    # transformers leaves these on every attention once an output was captured; they act with output_attentions only.
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _special(weight: torch.Tensor) -> str | None:
    """Return a reason where a weight is more than numbers in memory: quantized, or spread over devices."""
    if type(weight) not in (torch.nn.Parameter, torch.Tensor):
        return f"a weight is a {type(weight).__name__}"
    return "a weight is not in memory" if weight.is_meta else None
