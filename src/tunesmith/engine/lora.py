"""PEFT's LoRA layer with our forward where that is the same thing, and PEFT's own everywhere else.

``fused_lora(config)`` asks PEFT, through its documented hook for custom layers, to build :class:`FusedLoraLinear` for
plain linear layers. It is a ``peft.tuners.lora.Linear``: names, saving, merging and switching adapters are PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLoraLinear

from tunesmith.ops.lora_linear import lora_linear

__all__ = ["FusedLoraLinear", "fused_lora"]


def fused_lora(config: LoraConfig) -> LoraConfig:
    """Make PEFT use :class:`FusedLoraLinear` for this config. Not written to ``adapter_config.json``."""
    config._register_custom_module({torch.nn.Linear: FusedLoraLinear})
    return config


class FusedLoraLinear(PeftLoraLinear):
    """A PEFT LoRA layer that computes one active plain adapter through ``ops.lora_linear``."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return base plus adapter for ``x`` (..., D)."""
        # Under autocast the dtypes are torch's to choose: PEFT's own layer lets it.
        is_plain = not args and not kwargs and not torch.is_autocast_enabled(x.device.type)
        name = self._plain_adapter() if is_plain else None
        if name is None:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return lora_linear(x, base.weight, a, b, scale=self.scaling[name], bias=base.bias)

    def _plain_adapter(self) -> str | None:
        """Return the name of the active adapter when our function computes exactly what PEFT would."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return None
        base = self.get_base_layer()
        drops = self.training and not isinstance(self.lora_dropout[name], torch.nn.Identity)
        trains_base = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        return None if drops or trains_base or type(base) is not torch.nn.Linear else name
