"""LoftQ: the base rounded to few bits, and an adapter that starts with what the rounding lost.

Li et al. 2023, arXiv:2310.08659, algorithm 1. For every adapted weight W, from A = B = 0 on, again and again

    Q = round(W - s B A)
    s B A = the R largest singular directions of W - Q

where s is the scale of the adapter. The round with the smallest rest W - Q - s B A is kept, so that more of them never
do harm. The base becomes Q, as plain numbers in its own dtype: it is as large as before until it is loaded in as many
bits. Rounding is what the base is going to be stored as:

    8 bits    LLM.int8: a scale for each row, whole numbers from -127 to 127
    4 bits    NF4 with double quantization, by bitsandbytes, as ``load_in_4bit`` does
    2 bits    normal float of two bits (-1, 0, 0.338, 1) with a float32 scale for each block of 64
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import AdapterError, ModelError
from tunesmith.core.versions import installed

if TYPE_CHECKING:
    import torch

__all__ = ["Rounding", "normal_float", "round_base", "rounded"]

_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding the base cost.

    Attributes:
        layers: number of weights that were rounded.
        bits: of each of their entries.
        plain: Frobenius norm of what rounding alone would have lost, as a share of the weights.
        loftq: the same for what base and adapter together lost.
    """

    layers: int
    bits: int
    plain: float
    loftq: float

    def __str__(self) -> str:
        return (
            f"LoftQ rounded {self.layers} weights of the base to {self.bits} bits: {100 * self.loftq:.2f} % of them is "
            f"lost with the adapter, {100 * self.plain:.2f} % by rounding alone"
        )


def round_base(model: Any, *, bits: int, iterations: int) -> Rounding:
    """Round the base of a fresh LoRA adapter in place and start A and B with what that lost.

    Raises:
        AdapterError: an adapted layer is no linear layer of 16 or 32 bits.
        ModelError: ``bits`` is 4 and bitsandbytes is not installed.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    if bits == 4 and installed("bitsandbytes") is None:
        raise ModelError("LoftQ in 4 bits needs the package bitsandbytes. Install it: pip install bitsandbytes")
    whole, plain, rest, count = 0.0, 0.0, 0.0, 0
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer.get_base_layer()) is not torch.nn.Linear:
            raise AdapterError(
                f"LoftQ rounds linear layers, and {name} is a {type(layer.get_base_layer()).__name__}. Leave it out of "
                "target_modules."
            )
        norms = _round_layer(layer, bits, iterations)
        whole, plain, rest = (total + norm**2 for total, norm in zip((whole, plain, rest), norms, strict=True))
        count += 1
    return Rounding(count, bits, (plain / whole) ** 0.5, (rest / whole) ** 0.5)


def _round_layer(layer: Any, bits: int, iterations: int) -> tuple[float, float, float]:
    """Round one layer; return the norms of W, of what rounding alone lost, and of what is lost now."""
    import torch

    (adapter,) = layer.lora_A
    base, a, b = layer.get_base_layer(), layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    scale, dtype = layer.scaling[adapter], base.weight.dtype
    with torch.no_grad():
        weight = base.weight.to(torch.float32, copy=True)
        low, best, plain = torch.zeros_like(weight), float("inf"), 0.0
        for turn in range(iterations):
            base_now = rounded(weight - low, bits).to(dtype)
            lost = weight - base_now.float()
            plain = float(lost.norm()) if turn == 0 else plain
            u, s, v = torch.linalg.svd(lost, full_matrices=False)
            rank = min(len(a), len(s))
            root = (s[:rank] / scale).sqrt()
            first_a, first_b = root[:, None] * v[:rank], u[:, :rank] * root
            low = scale * first_b @ first_a
            if float((lost - low).norm()) < best:
                best = float((lost - low).norm())
                base.weight.copy_(base_now)
                # Of a rank above that of the weight the rest starts as it was: A random, B zero.
                a[:rank], b[:, :rank] = first_a.to(a.dtype), first_b.to(b.dtype)
    if adapter in layer.lora_variant:
        # DoRA starts from the norms of the weight that it finds.
        layer.lora_variant[adapter].init(layer, adapter_name=adapter, config=None)
    return float(weight.norm()), plain, best


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return (F, D) float32 ``weight`` as 2, 4 or 8 bits hold it; see the module for how."""
    import torch

    if bits == 8:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return (weight / scale).round() * scale
    if bits == 4:
        from bitsandbytes import functional

        # As one row: see ``protect_gradients`` for what rows that end within a block do.
        codes, state = functional.quantize_4bit(
            weight.reshape(1, -1), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return functional.dequantize_4bit(codes, state).view_as(weight)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % _BLOCK)).view(-1, _BLOCK)
    scale = flat.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    values = normal_float(bits).to(weight.device)
    # A value belongs to the nearest entry: between two of them their mean decides.
    nearest = torch.bucketize(flat / scale, (values[1:] + values[:-1]) / 2)
    return (values[nearest] * scale).flatten()[: weight.numel()].view_as(weight)


def normal_float(bits: int) -> torch.Tensor:
    """Return the 2^bits entries of a normal float, from -1 to 1: quantiles of the normal distribution, and zero.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; with 4 bits NF4.
    """
    import torch

    half, outermost = 2 ** (bits - 1), 0.9677083
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = torch.special.ndtri(torch.linspace(outermost, 0.5, half, dtype=torch.float64)[:-1])
    entries = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (entries / above[0]).float()
