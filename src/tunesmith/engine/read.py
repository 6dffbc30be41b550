"""From modules to numbers: what one projection or norm of a layer is in this call, PEFT's adapter included.

Read anew in every call, so that whatever PEFT does in between (adapters added, switched, disabled, merged) is seen.
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.ops.lora_linear.cpu import Projection

__all__ = ["read_blocks", "read_norm", "read_projection"]


def read_projection(module: Any, *, training: bool) -> Projection | str:
    """Return the linear layer with its active adapter, or the reason why it is more than that."""
    if type(module) is torch.nn.Linear:
        return _special(module.weight) or Projection(module.weight, module.bias)
    from peft.tuners.lora import Linear as LoraLinear

    if not isinstance(module, LoraLinear):
        return f"a layer is a {type(module).__name__}"
    base = module.get_base_layer()
    if type(base) is not torch.nn.Linear:
        return f"the base of an adapter is a {type(base).__name__}"
    weight, bias = base.weight, base.bias
    found = _hooked(base) or _special(weight)
    if found:
        return found
    if module.merged and module.disable_adapters:
        return "a merged adapter is disabled"  # PEFT's own forward takes it out of the weight first
    if module.merged or module.disable_adapters:
        return Projection(weight, bias)
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return Projection(weight, bias)
    if len(names) > 1:
        return f"{len(names)} adapters are active at once"
    (name,) = names
    if name in module.lora_variant:
        return f"the adapter is a variant of LoRA ({type(module.lora_variant[name]).__name__})"
    if module.lora_bias[name]:
        return "lora_B has a bias"
    drop = module.lora_dropout[name]
    found = _hooked(drop, module.lora_A[name], module.lora_B[name])
    if found:
        return found
    dropout = float(drop.p) if training and drop.training and isinstance(drop, torch.nn.Dropout) else 0.0
    return Projection(
        weight, bias, module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]), dropout
    )


def read_norm(module: Any) -> torch.Tensor | str:
    """Return the weight of an RMSNorm module, or the reason why it is something else."""
    if not type(module).__name__.endswith("RMSNorm"):
        return f"a norm is a {type(module).__name__}"
    return module.weight


def read_blocks(layer: Any) -> str | None:
    """Return the reason why a layer's blocks, and what they consist of, have to run as modules, or None."""
    blocks = list(layer.children())
    return _hooked(*blocks, *(part for block in blocks for part in block.children()))


def _hooked(*modules: Any) -> str | None:
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
