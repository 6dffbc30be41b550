"""From modules to numbers: what one projection or norm of a layer is in this call, PEFT's adapter included.

Read anew in every call, so that whatever PEFT does in between (adapters added, switched, disabled, merged) is seen.
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.ops.lora_linear.cpu import Projection

__all__ = ["read_norm", "read_projection"]


def read_projection(module: Any, *, training: bool) -> Projection | str:
    """Return the linear layer with its active adapter, or the reason why it is more than that."""
    if type(module) is torch.nn.Linear:
        return Projection(module.weight, module.bias)
    from peft.tuners.lora import Linear as LoraLinear

    if not isinstance(module, LoraLinear):
        return f"a layer is a {type(module).__name__}"
    base = module.get_base_layer()
    if type(base) is not torch.nn.Linear:
        return f"the base of an adapter is a {type(base).__name__}"
    weight, bias = base.weight, base.bias
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
    dropout = float(drop.p) if training and drop.training and isinstance(drop, torch.nn.Dropout) else 0.0
    return Projection(
        weight, bias, module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]), dropout
    )


def read_norm(module: Any) -> torch.Tensor | str:
    """Return the weight of an RMSNorm module, or the reason why it is something else."""
    if not type(module).__name__.endswith("RMSNorm"):
        return f"a norm is a {type(module).__name__}"
    return module.weight
