"""PEFT's LoRA layer with our forward where that is the same thing, and PEFT's own everywhere else.

``fused_lora(config)`` asks PEFT, through its documented hook for custom layers, to build :class:`FusedLoraLinear` for
plain linear layers. It is a ``peft.tuners.lora.Linear``: names, saving, merging and switching adapters are PEFT's.
On quantized layers its own classes stay, but for merging, which would round the training away; layers in float8 get
:class:`Float8LoraLinear`, and those that train for quantization (``models/qat.py``) :class:`QatLoraLinear`.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLoraLinear

from tunesmith.core.errors import AdapterError
from tunesmith.engine.float8 import Float8Linear
from tunesmith.engine.read import hooked
from tunesmith.ops.lora_linear import lora_linear

__all__ = ["Float8LoraLinear", "FusedLoraLinear", "QatLoraLinear", "fused_lora", "merged_weight"]


def fused_lora(config: LoraConfig) -> LoraConfig:
    """Make PEFT use the classes of this module for this config. Not written to ``adapter_config.json``."""
    # PEFT takes the first that fits, and the layers of bitsandbytes are linear layers too.
    known = {**_quantized_layers(), Float8Linear: Float8LoraLinear, **_rounding_layers()}
    config._register_custom_module({**known, torch.nn.Linear: FusedLoraLinear})
    return config


@functools.cache
def _quantized_layers() -> dict[type, type]:
    """Return the layers of bitsandbytes with the LoRA layers for them; none where it was not imported."""
    if "bitsandbytes" not in sys.modules:
        return {}
    import bitsandbytes
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    return {
        bitsandbytes.nn.Linear4bit: type("Linear4bit", (_Unmergeable, Linear4bit), {"__module__": __name__}),
        bitsandbytes.nn.Linear8bitLt: type("Linear8bitLt", (_Unmergeable, Linear8bitLt), {"__module__": __name__}),
    }


def _rounding_layers() -> dict[type, type]:
    """Return the layer by which torchao trains for quantization with the LoRA layer for it; none before its import."""
    if "torchao" not in sys.modules:
        return {}
    from torchao.quantization.qat import FakeQuantizedLinear

    return {FakeQuantizedLinear: QatLoraLinear}


class _Unmergeable:
    """In front of PEFT's classes for quantized layers.

    Rounding base plus adapter to the grid of the base again undoes most of the training: on SmolLM2 the loss went from
    2.231 to 3.219 in 4 bits (base 3.236), in 8 bits from 2.109 to 2.835. And PEFT starts "orthogonal" in the dtype of
    the base's weight, which here is that of codes.
    """

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        raise AdapterError(
            "merging into a quantized base would round the training away. Save the adapter, load it on the base in 16 "
            "bits (load_in_16bit=True) and merge there."
        )

    def orthogonal_init(self: Any, adapter_name: str) -> None:
        """Start A and B as PEFT does, in float32."""
        rank = self.r[adapter_name]
        if rank % 2:
            raise AdapterError(f"init_lora_weights='orthogonal' needs an even rank, and r is {rank}.")
        q, _ = torch.linalg.qr(torch.randn(rank, rank))
        a = torch.randn(self.in_features, rank // 2) @ q[0::2] / 10
        b = torch.randn(self.out_features, rank // 2) @ q[1::2] / 10
        self.lora_A[adapter_name].weight = torch.nn.Parameter(a.T.contiguous())
        self.lora_B[adapter_name].weight = torch.nn.Parameter(b)


class Float8LoraLinear(_Unmergeable, PeftLoraLinear):
    """A PEFT LoRA layer on one in float8."""

    def resolve_lora_variant(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse DoRA and its like: PEFT would take the codes of the weight for its numbers."""
        found: Any = super().resolve_lora_variant(*args, **kwargs)
        if found is not None:
            raise AdapterError(
                f"{type(found).__name__} reads the weights of the base, which PEFT cannot do in float8. Leave "
                "load_in_fp8 out, or use load_in_8bit=True."
            )
        return found


class QatLoraLinear(PeftLoraLinear):
    """A PEFT LoRA layer on one that rounds: base and adapter are rounded together, as they will be stored.

        y = q(x) q(W + s B A)' + bias

    Rounding W alone, as torchtune's ``QATLoRALinear`` does, trains the adapter for a sum that no exported model has:
    what is exported is one weight, and rounding that moves the adapter's share too.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what the layer will return for ``x`` (..., D) when it is merged and quantized."""
        return torch.func.functional_call(self.get_base_layer(), {"weight": merged_weight(self)}, (x,))


def merged_weight(layer: Any) -> torch.Tensor:
    """Return W + s B A of a PEFT LoRA layer with its active adapters, added in float32, in the dtype of W."""
    weight = layer.get_base_layer().weight
    names = [] if layer.merged or layer.disable_adapters else [n for n in layer.active_adapters if n in layer.lora_A]
    if not names:
        return weight
    total = weight.float()
    for name in names:
        total = total + layer.scaling[name] * (layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float())
    return total.to(weight.dtype)


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
        base, drop = self.get_base_layer(), self.lora_dropout[name]
        if base.weight.is_meta or hooked(base, self.lora_A[name], self.lora_B[name], drop):
            return None
        drops = self.training if type(drop) is torch.nn.Dropout else type(drop) is not torch.nn.Identity
        trains_base = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        return None if drops or trains_base or type(base) is not torch.nn.Linear else name
