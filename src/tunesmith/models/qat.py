"""Quantization-aware training: linear layers that compute with the numbers that a scheme of torchao will leave of them.

While it trains, a weight keeps its dtype; wherever it computes, it is rounded as the scheme says, and its gradient
passes the rounding as if it were not there. What is exported (``export/torchao.py``) then answers as what was trained.
With LoRA the base and its adapter are rounded together (``engine/lora.py``), because they are exported as one weight.

:data:`SCHEMES` is the whole list. What a machine can train and convert is not looked up but tried, on one small layer
for each width of the model, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.core.names import did_you_mean
from tunesmith.core.versions import installed
from tunesmith.models.load import facts_of
from tunesmith.models.settings import QAT_ALIASES, asked_by
from tunesmith.models.whole import decoder_linears, refuse_other_tasks, swap_layers

__all__ = ["SCHEMES", "Scheme", "conversion_fails", "prepare", "refuse_other_scheme", "scheme_of", "training_fails"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to store linear layers, as torchao knows it.

    Attributes:
        name: as ``qat_scheme`` names it; the class of the config for one of the user's own.
        meaning: in words.
        config: the config that torchao quantizes by.
        divisor: the width of every layer's input has to be a multiple of it.
        converts_on: what real quantization needs beyond torchao; empty: any machine converts.
    """

    name: str
    meaning: str
    config: Any
    divisor: int = 1
    converts_on: str = ""

    def record(self) -> Any:
        """Return what :func:`scheme_of` makes this scheme of again, as JSON values."""
        from torchao.core.config import config_to_dict

        return self.name if self.name in SCHEMES else config_to_dict(self.config)

    def __str__(self) -> str:
        """Return name and meaning."""
        return f"{self.name} ({self.meaning})"


def _int8_int4() -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))


def _int8() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis

    # Int8WeightOnlyConfig stores the same numbers, but torchao cannot train for it.
    return IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))


def _int4() -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=128)


def _fp8_int4() -> Any:
    from torchao.quantization import Float8DynamicActivationInt4WeightConfig

    return Float8DynamicActivationInt4WeightConfig()


def _fp8_fp8() -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


_MSLK = "a GPU with the package mslk (1.0 or newer)"
_FP8_GPU = "a GPU that computes in float8 (compute capability 8.9 or newer)"

# Seen with torchao 0.18 on a CPU: every scheme trains, and int8-int4 and int8 convert to numbers that are equal bit for
# bit to what was trained. nvfp4 and mxfp4, which are no names here, do not train: they need a GPU's scaled products.
#        name         meaning                                              config      divisor  converts on
SCHEMES: dict[str, tuple[str, Callable[[], Any], int, str]] = {
    "int8-int4": ("int8 activations a token, int4 weights in groups of 32", _int8_int4, 32, ""),
    "int8":      ("int8 weights with a scale a row",                        _int8,      1,   ""),
    "int4":      ("int4 weights in groups of 128",                          _int4,      128, _MSLK),
    "fp8-int4":  ("float8 activations, int4 weights in groups of 128",      _fp8_int4,  128, _MSLK),
    "fp8-fp8":   ("float8 activations and weights, a scale a row",          _fp8_fp8,   1,   _FP8_GPU),
}  # fmt: skip
"""Every scheme that has a name."""


def scheme_of(asked: Any) -> Scheme:
    """Return the scheme that is meant by a name, an alias, a config of torchao, or what a JSON record made of one.

    Raises:
        SettingsError: the name is not known, or it is something else.
        ModelError: torchao is not installed.
    """
    if isinstance(asked, Scheme):
        return asked
    if installed("torchao") is None:
        raise ModelError("a qat_scheme needs the package torchao. Install it: pip install torchao")
    from torchao.core.config import AOBaseConfig, config_from_dict

    if isinstance(asked, str):
        name = QAT_ALIASES.get(asked, asked)
        if name not in SCHEMES:
            known = [*SCHEMES, *QAT_ALIASES]
            raise SettingsError(
                f"qat_scheme={asked!r} is not known: {', '.join(known)}, or a config of torchao."
                f"{did_you_mean(asked, known)}"
            )
        meaning, config, divisor, needs = SCHEMES[name]
        return Scheme(name, meaning, config(), divisor, needs)
    config = config_from_dict(asked) if isinstance(asked, dict) else asked
    for name, (_, known, _, _) in SCHEMES.items():
        if known() == config:
            return scheme_of(name)
    if not isinstance(config, AOBaseConfig):
        raise SettingsError(
            f"qat_scheme is a {type(asked).__name__}; one of {', '.join(SCHEMES)} or a config of torchao is needed."
        )
    return Scheme(type(config).__name__, "a config of torchao", config)


def prepare(model: Any, asked: Any) -> Scheme:
    """Make the linear layers of the decoder of ``model`` compute as the scheme ``asked`` will, and say so in its facts.

    Raises:
        SettingsError: the scheme is not known, does not fit the widths of the model, or cannot be trained here.
        ModelError: the base is quantized already, or was prepared already.
        NotSupportedYetError: the model is no causal language model.
    """
    scheme, facts = scheme_of(asked), facts_of(model)
    refuse_other_tasks(facts, f"qat_scheme={scheme.name}")
    width = facts.width or facts.trained_in
    stored = facts.qat or (width and asked_by(width))
    if stored is not None:
        raise ModelError(
            f"qat_scheme={scheme.name}: the weights of this model are rounded already ({stored}), and would be rounded "
            "twice. Load it in 16 or 32 bits."
        )
    widths = {layer.in_features for _, layer in decoder_linears(model)}
    reason = training_fails(scheme, widths, facts.dtype.dtype)
    if reason is not None:
        raise SettingsError(f"qat_scheme={scheme.name} cannot be trained here: {reason}")

    swap_layers(model, lambda layer: _rounding(layer, scheme).train(layer.training))
    facts.qat, model.tunesmith_facts = scheme, facts
    facts.notes.append(f"quantization-aware training for {scheme}")
    later = conversion_fails(scheme, widths, facts.dtype.dtype)
    if later is not None:
        facts.notes.append(later)
    return scheme


def _rounding(layer: nn.Linear, scheme: Scheme) -> Any:
    """Return torchao's layer for training with the Parameters of ``layer``, whose gradients pass the rounding."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    holder = nn.Sequential(layer)  # torchao changes the children of what it is given
    quantize_(holder, QATConfig(scheme.config, step="prepare"))
    made: Any = holder[0]
    for name in ("weight_fake_quantizer", "activation_fake_quantizer"):
        if getattr(made, name, None) is not None:
            setattr(made, name, _Through(getattr(made, name)))
    return made


class _Through(nn.Module):
    """A quantizer of torchao whose gradient is that of the identity (Bengio et al. 2013, arXiv:1308.3432).

    Its own gradients pass through the number format: what is below 2^-10, in float8, becomes zero, and that is most of
    a real model's. The others are kept with masks and scales that cost several times the memory of the weight.
    """

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer, self.config = quantizer, quantizer.config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` rounded, in its dtype."""
        return _Rounded.apply(x, self.quantizer)


class _Rounded(torch.autograd.Function):
    """``apply(x, quantizer) -> quantizer(x)``, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, quantizer: Any) -> torch.Tensor:
        """Return ``quantizer(x)``."""
        return quantizer(x.detach()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Return the gradient as it is."""
        return grads[0], None


def refuse_other_scheme(model: Any, asked: Any) -> None:
    """Refuse a ``qat_scheme`` that a model, which has been prepared or adapted already, does not have.

    Raises:
        SettingsError: it was prepared for another scheme, or for none.
    """
    own = facts_of(model).qat
    if asked is not None and scheme_of(asked) != own:
        raise SettingsError(
            f"qat_scheme={scheme_of(asked).name}: the model trains {f'for {own.name}' if own else 'for no scheme'} "
            "already. Give it when the base is loaded (full_finetuning) or adapted first."
        )


def training_fails(scheme: Scheme, widths: Iterable[int], dtype: torch.dtype) -> str | None:
    """Return the reason why layers with inputs of these ``widths`` cannot be trained for ``scheme``, or None."""
    for width in sorted(widths):
        if width % scheme.divisor:
            return f"it needs widths that are multiples of {scheme.divisor}, and this model has one of {width}."
        reason = _try(scheme, width, dtype, convert=False)
        if reason is not None:
            return reason
    return None


def conversion_fails(scheme: Scheme, widths: Iterable[int], dtype: torch.dtype) -> str | None:
    """Return the sentence that says why this machine cannot quantize such layers for real or run them, or None."""
    for width in sorted(widths):
        reason = _try(scheme, width, dtype, convert=True)
        if reason is not None:
            needs = f"it needs {scheme.converts_on}" if scheme.converts_on else reason
            return f"{scheme.name} can be trained here, but neither converted nor run: {needs}"
    return None


def _try(scheme: Scheme, width: int, dtype: torch.dtype, *, convert: bool) -> str | None:
    """Train a small layer for a step, or convert and run it; return what went wrong in one line."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedLinear

    from tunesmith.core.device import choose_device

    device = choose_device()
    with torch.random.fork_rng(), torch.enable_grad():
        holder = torch.nn.Sequential(torch.nn.Linear(width, 32, bias=False, device=device, dtype=dtype))
        x = torch.ones(16, width, device=device, dtype=dtype)
        try:
            if convert:
                quantize_(holder, scheme.config)
                with torch.no_grad():
                    holder(x)
            else:
                made = _rounding(holder[0], scheme)
                if not isinstance(made, FakeQuantizedLinear):
                    return f"torchao trains it with a {type(made).__name__}, which is not supported."
                made(x).sum().backward()
        # torchao says no in all of these ways.
        except (ValueError, AssertionError, ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
            return next(iter(str(error).splitlines()), "") or type(error).__name__
    return None
