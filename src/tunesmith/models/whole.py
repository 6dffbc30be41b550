"""Full fine-tuning of a model whose linear layers are stored in 8 bits, or computed in 4.

8 bits: the weight is int8 with a scale a row (torchao's quantized training), and there is no other copy of it. Each
optimizer step rounds it up or down at random, right on average. Saved, it is a plain model in the model's dtype.

4 bits: the weight keeps the model's dtype, and the layer computes with what is left of it in NF4 (double quantization,
as ``load_in_4bit`` has it). The gradient passes the rounding as if it were not there (Bengio et al. 2013,
arXiv:1308.3432). Saved, it is the 4-bit model itself, in the files of bitsandbytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tunesmith.core.errors import ModelError, NotSupportedYetError
from tunesmith.core.tasks import CAUSAL_LM
from tunesmith.core.versions import installed
from tunesmith.engine.install import engine_of, install
from tunesmith.engine.read import four_bit_weight
from tunesmith.models.load import ModelFacts, facts_of
from tunesmith.models.quantize import quantization_config, quantize_nf4
from tunesmith.models.settings import Width
from tunesmith.ops.once import differentiable_once
from tunesmith.ops.quantized import dequantize
from tunesmith.ops.quantized.weights import FourBitWeight

__all__ = [
    "FourBitLinear",
    "WholeModel",
    "decoder_linears",
    "int8_layers",
    "is_torchaos",
    "refuse_other_tasks",
    "swap_layers",
    "train_in",
]

_SCALES = "_scales"


def decoder_linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and module of every linear layer but the output head and the parts of adapters."""
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    for name, module in model.named_modules():
        is_adapter = any(part.startswith("lora_") for part in name.split("."))
        if isinstance(module, nn.Linear) and not is_adapter and not any(module is head for head in heads):
            yield name, module


def refuse_other_tasks(facts: ModelFacts, what: str) -> None:
    """Refuse ``what`` for models that are no causal language models, whose heads and layers it does not know.

    Raises:
        NotSupportedYetError: with the task.
    """
    if facts.task != CAUSAL_LM:
        raise NotSupportedYetError(f"{what} with task_type={facts.task!r} is not supported yet. Leave it out.")


def is_torchaos(model: Any) -> bool:
    """Return whether torchao has quantized linear layers of ``model``, in whatever way."""
    return any(type(layer.weight).__module__.startswith("torchao.") for _, layer in decoder_linears(model))


def train_in(model: Any, width: Width) -> None:
    """Store the linear layers of the decoder of ``model`` in 8 bits, or compute with them in 4.

    ``save_pretrained`` then saves the result as the module says. The fused layers of the engine do not know such
    weights; those of transformers take their place.

    Raises:
        ModelError: the package that this needs is not installed.
        NotSupportedYetError: the model is no causal language model.
    """
    package = "torchao" if width == "8bit" else "bitsandbytes"
    if installed(package) is None:
        raise ModelError(f"full_finetuning=True with load_in_{width}=True needs {package}: pip install {package}")
    facts = facts_of(model)
    refuse_other_tasks(facts, f"full_finetuning with load_in_{width}")
    facts.notes.append(_note(model, width))
    swap_layers(model, _to_int8 if width == "8bit" else FourBitLinear.around)
    model.__class__ = _class_for(type(model))
    facts.trained_in = width


def swap_layers(model: Any, change: Callable[[nn.Linear], nn.Module]) -> None:
    """Put ``change(layer)`` in the place of every linear layer of the decoder, and the engine around what came out."""
    engine = engine_of(model)
    if engine is not None:
        engine.revert()
    for name, layer in list(decoder_linears(model)):
        model.set_submodule(name, change(layer))
    if engine is not None:
        notes = facts_of(model).notes
        notes += [reason for reason in install(model).plan.reasons if reason not in notes]


def _note(model: Any, width: Width) -> str:
    """Return the line of the banner that says how such weights train and what they cost."""
    sizes = [(p.numel(), p.itemsize) for _, layer in decoder_linears(model) for p in [layer.weight]]
    count, size = sum(entries for entries, _ in sizes), sizes[0][1] if sizes else 0
    dense = f"{count * size / 2**20:,.0f} MiB"
    if width == "8bit":
        return (
            f"full fine-tuning in 8 bits: {count:,} weights of the decoder in int8, {count / 2**20:,.0f} MiB in place "
            f"of {dense}, rounded at random in each step; 2 bytes of optimizer state a weight in place of 8"
        )
    return (
        f"full fine-tuning in 4 bits: {count:,} weights of the decoder train in {8 * size} bits ({dense}) and are "
        "rounded to NF4 wherever they compute; the saved model is the 4-bit one"
    )


# ---- 8 bits ----


def _to_int8(layer: nn.Linear) -> nn.Linear:
    from torchao.prototype.quantized_training import Int8QuantizedTrainingLinearWeight as Int8Weight

    layer.weight = nn.Parameter(Int8Weight.from_float(layer.weight.data))
    return layer


def int8_layers(model: Any) -> dict[str, Any]:
    """Return the layers whose weights train in int8, by name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(getattr(layer, "weight", None), "int_data")}


# ---- 4 bits ----


class FourBitLinear(nn.Linear):
    """A linear layer that computes with the NF4 value of its weight and trains the weight itself.

    On a CPU the codes stay until the weight changes: rounding takes longer than a product with few tokens.
    """

    _kept: tuple[tuple[int, torch.Tensor, torch.Tensor], FourBitWeight] | None = None

    @classmethod
    def around(cls, layer: nn.Linear) -> FourBitLinear:
        """Return a layer with the Parameters of ``layer``."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., F) in the dtype of ``x`` (..., D)."""
        return _StraightThrough.apply(x, self.weight, self.bias, self._codes())

    @property
    def codes_bytes(self) -> int:
        """Bytes of the codes and of their scales, one a block of 64 entries."""
        return self.weight.numel() * 33 // 64

    def _codes(self) -> FourBitWeight:
        weight = self.weight.detach()
        if weight.device.type != "cpu":
            return four_bit_weight(*quantize_nf4(weight))
        # A write through .data or a pointer, as optimizers in 8 bits do it, leaves the version as it was. So each row
        # has a hash, the exclusive or of its entries; equal pairs and another order, which it misses, change the sums.
        mark = (weight._version, torch.hash_tensor(weight, dim=1), weight.sum(0, dtype=torch.float32))
        if self._kept is None or not _equal(self._kept[0], mark):
            self._kept = (mark, four_bit_weight(*quantize_nf4(weight)))
        return self._kept[1]

    def quantized(self) -> tuple[torch.Tensor, Any]:
        """Return codes and ``QuantState`` of the weight, as bitsandbytes makes them when it loads it."""
        return quantize_nf4(self.weight.data)


def _equal(one: tuple[int, torch.Tensor, torch.Tensor], other: tuple[int, torch.Tensor, torch.Tensor]) -> bool:
    return one[0] == other[0] and all(map(torch.equal, one[1:], other[1:]))


class _StraightThrough(torch.autograd.Function):
    """``apply(x (..., D), weight (F, D), bias (F,) or None, codes) -> (..., F)``: a product with the rounded weight.

    ``codes`` are those of ``weight``, half a byte an entry, and kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, codes: FourBitWeight
    ) -> torch.Tensor:
        """Return ``x @ codes.T + bias``."""
        ctx.codes = codes
        ctx.save_for_backward(x)
        return nn.functional.linear(x, dequantize(ctx.codes, dtype=x.dtype), bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Return the gradients of x and bias, and of the weight as if it had not been rounded."""
        (dy,) = grads
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = dy @ dequantize(ctx.codes, dtype=dy.dtype) if needs_x else None
        flat = dy.flatten(0, -2)
        return dx, flat.T @ x.flatten(0, -2) if needs_weight else None, flat.sum(0) if needs_bias else None, None


# ---- saving ----


class WholeModel:
    """In front of the class of a transformers model that trains in 8 or 4 bits.

    Attributes:
        saves_raw: save what training goes on from, and not its result.
    """

    saves_raw = False

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does; see the module for what."""
        if kwargs.get("state_dict") is None:
            kwargs["state_dict"] = self._state()
        config: Any = self.config  # type: ignore[attr-defined]
        packs = not self.saves_raw and any(isinstance(x, FourBitLinear) for x in self.modules())  # type: ignore[attr-defined]
        if packs:
            config.quantization_config = quantization_config("4bit", self.dtype)  # type: ignore[attr-defined]
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            if packs:
                del config.quantization_config

    def _state(self) -> dict[str, torch.Tensor]:
        """Return the tensors to save by name."""
        state: dict[str, torch.Tensor] = self.state_dict()  # type: ignore[attr-defined]
        for name, layer in int8_layers(self).items():
            state[f"{name}.weight"] = layer.weight.dequantize().detach()
            if self.saves_raw:
                # With them the codes can be read off the weight again, bit for bit.
                state[f"{name}.weight{_SCALES}"] = layer.weight.scale
        for name, layer in () if self.saves_raw else list(self.named_modules()):  # type: ignore[attr-defined]
            if isinstance(layer, FourBitLinear):
                state[f"{name}.weight"], parts = layer.quantized()
                state |= {f"{name}.weight.{key}": value for key, value in parts.as_dict(packed=True).items()}
        return state

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as torch does; an int8 weight takes the codes that it was saved with."""
        rest = dict(state_dict)
        for name, layer in int8_layers(self).items():
            weight, scales = rest.pop(f"{name}.weight", None), rest.pop(f"{name}.weight{_SCALES}", None)
            if weight is not None:
                rest[f"{name}.weight"] = _int8_again(layer.weight, weight, scales)
        return super().load_state_dict(rest, *args, **kwargs)  # type: ignore[misc]


def _int8_again(like: Any, weight: torch.Tensor, scales: torch.Tensor | None) -> Any:
    kind = type(like)
    if scales is None:
        return kind.from_float(weight.to(like.dtype))
    codes = (weight.float() / scales.float()[:, None].clamp(min=torch.finfo(torch.float32).tiny)).round()
    return kind(codes.to(torch.int8), scales)


@functools.cache
def _class_for(original: type) -> type:
    """Return a class of the same name, which transformers writes into config.json."""
    return type(original.__name__, (WholeModel, original), {"__module__": original.__module__})
