"""The optimizer: AdamW for weights that are stored in bfloat16 or int8, and the rate of embeddings.

A step of 2e-5 on a weight of 0.02 is a thousandth of it, and bfloat16 keeps eight bits: rounded to nearest, most steps
would be lost without a sign. Here the new weight is made in float32 and rounded up or down at random, up with the
probability of its place between the two, so that the weight is right on average.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch

from tunesmith.core.errors import SettingsError
from tunesmith.models.whole import int8_layers
from tunesmith.training.settings import INT8_OPTIM, ONLY_INT8_OPTIM

__all__ = ["StochasticAdamW", "give_embeddings_their_rate", "int8_adamw", "optimizer_for", "round_stochastically"]

_PIECE = 2**22
"""Entries updated at a time: what lies between is 16 MiB each, however large the embedding is."""
_BLOCK, _LEAST_IN_8_BITS = 256, 4096
"""Moments in 8 bits: entries that share a scale, and of the smallest tensor that has them, as in bitsandbytes."""
# Name of AdamW -> whether its moments have 8 bits.
_ADAMW = {"adamw_torch": False, "adamw_torch_fused": False, "adamw_8bit": True, "adamw_bnb_8bit": True}


def optimizer_for(model: Any, args: Any) -> tuple[type, dict[str, Any]] | None:
    """Return class and arguments of the optimizer where trained weights of ``model`` are 8-bit or 16-bit, else None.

    For 8-bit ones ``args.optim`` becomes the one that they need, where nobody asked for another.

    Raises:
        SettingsError: ``args.optim`` is another than AdamW, whose steps 16-bit weights would lose, or than the one that
            8-bit weights can be updated by; or several processes train 8-bit weights.
    """
    if int8_layers(model):
        return _for_int8(args)
    if not any(p.requires_grad and p.itemsize < 4 and p.is_floating_point() for p in model.parameters()):
        return None
    name = str(getattr(args.optim, "value", args.optim))
    if name not in _ADAMW:
        raise SettingsError(
            f"optim={name} on weights in 16 bits would lose most steps to rounding. Leave optim out (AdamW with "
            "stochastic rounding), take adamw_8bit (the same with moments in 8 bits), or load the model with "
            "dtype='float32'."
        )
    return StochasticAdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "seed": args.seed,
        "in_8_bits": _ADAMW[name],
    }


def _for_int8(args: Any) -> tuple[type, dict[str, Any]]:
    name = str(getattr(args.optim, "value", args.optim))
    if name != INT8_OPTIM and args.asked_for_optim:
        raise SettingsError(f"optim={name}: {ONLY_INT8_OPTIM}")
    if args.world_size > 1:
        raise SettingsError(
            "full_finetuning with load_in_8bit trains in one process: several would each round their weights in "
            "another way. Train in 16 bits there."
        )
    args.optim = type(args.optim)(INT8_OPTIM)
    return int8_adamw(), {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


@functools.cache
def int8_adamw() -> type:
    """Return torchao's AdamW8bit for int8 weights, made to keep the moments of small tensors in float32.

    Moments of tensors with 4096 entries or more (a multiple of 256) have 8 bits. torchao keeps the others in the dtype
    of their weight, where bfloat16 would lose most of what is added to them. Weights in bfloat16 (embedding, norms) are
    rounded at random like int8 ones, by torch's own generator, whose state is in a checkpoint. torchao compiles an
    update for each shape of a weight in the first step; without a compiler it runs as it is, slower.
    """
    from torchao.optim import AdamW8bit

    class Int8AdamW(AdamW8bit):
        def __init__(self, params: Any, **arguments: Any) -> None:
            super().__init__(params, bf16_stochastic_round=True, **arguments)

        def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
            made = super()._new_buffer(p, signed)
            return made.float() if type(made) is torch.Tensor else made

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            with nullcontext() if _has_compiler() else torch.compiler.set_stance("force_eager"):
                return super().step(closure)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            _restore_moments(self, state_dict)

    return Int8AdamW


def _has_compiler() -> bool:
    """Return whether torch.compile can build what it makes for a CPU; for a GPU it brings its own."""
    return torch.cuda.is_available() or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def _restore_moments(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put moments back as they were saved; torch has rounded float32 ones to the dtype of their weight."""
    saved = state_dict["state"]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"):
            value = saved[index].get(name) if index in saved else None
            if type(value) is torch.Tensor:
                optimizer.state[parameter][name] = value.to(parameter.device).clone()


def give_embeddings_their_rate(optimizer: torch.optim.Optimizer, model: Any, rate: float | None) -> None:
    """Put the trained weights of embedding and output head of ``model`` into groups of their own.

    Their rate is ``rate``, also that of an adapter on them; None means a tenth of the others' where they train whole
    beside an adapter, and the same where all weights train.

    Raises:
        SettingsError: a rate is given and neither of them trains.
    """
    if rate is None and not hasattr(model, "peft_config"):
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    chosen = {
        id(parameter)
        for module in modules
        if module is not None
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (rate is not None or "lora_" not in name)
    }
    if rate is not None and not chosen:
        raise SettingsError(
            "embedding_learning_rate has no effect: neither embedding nor output head trains. Name them in "
            "modules_to_save, which trains them whole, or in target_modules, or leave the rate out."
        )
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in chosen]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            optimizer.add_param_group({**group, "params": own, "lr": group["lr"] / 10 if rate is None else rate})


def round_stochastically(x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return ``x`` (float32, finite) in bfloat16, each entry one of its two neighbours, right on average.

    Source: Gupta et al. 2015, arXiv:1502.02551, section 4.
    """
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # bfloat16 is the upper half of a float32: what is added to the lower half carries over as often as it should.
    return noise.add_(x.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with float32 moments and stochastic rounding of weights.

    Weights may be bfloat16 or float32 (which are not rounded). The noise depends on ``seed``, the step and the place of
    a weight alone: every process draws the same, and a resumed run goes on as it would have. ``in_8_bits``: moments of
    tensors with 4,096 entries or more are stored in 8 bits with a scale for each 256 (Dettmers et al. 2022,
    arXiv:2110.02861; the codes are those of bitsandbytes).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        in_8_bits: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed, self.in_8_bits = seed, in_8_bits

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                self._begin(state, name, parameter)
        state["step"] += 1
        count, (beta1, beta2) = int(state["step"]), group["betas"]
        generator = torch.Generator(parameter.device).manual_seed(hash((self.seed, count, place)) % 2**63)
        rate, correction = group["lr"] / (1 - beta1**count), math.sqrt(1 - beta2**count)
        whole = (parameter.data.view(-1), parameter.grad.reshape(-1))
        for start in range(0, parameter.numel(), _PIECE):
            at = slice(start, min(start + _PIECE, parameter.numel()))
            weight, grad = whole[0][at], whole[1][at].float()
            mean, square = (_moment(state, name, at) for name in ("exp_avg", "exp_avg_sq"))
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            _keep(state, "exp_avg", at, mean)
            _keep(state, "exp_avg_sq", at, square)
            new = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
            new.addcdiv_(mean, square.sqrt().div_(correction).add_(group["eps"]), value=-rate)
            weight.copy_(round_stochastically(new, generator) if weight.dtype == torch.bfloat16 else new)

    def _begin(self, state: dict[str, Any], name: str, parameter: torch.Tensor) -> None:
        is_coded = self.in_8_bits and parameter.numel() >= _LEAST_IN_8_BITS
        wide = {"device": parameter.device, "dtype": torch.float32}
        if not is_coded:
            state[name] = torch.zeros(parameter.shape, **wide)
            return
        zero = int(_codes(name, parameter.device).abs().argmin())
        state[name] = torch.full(parameter.shape, zero, dtype=torch.uint8, device=parameter.device)
        state[f"{name}_scale"] = torch.zeros(-(-parameter.numel() // _BLOCK), **wide)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments as they were saved."""
        super().load_state_dict(state_dict)
        _restore_moments(self, state_dict)


@functools.cache
def _codes(name: str, device: torch.device) -> torch.Tensor:
    """Return the 256 values that 8 bits of a moment stand for, of a block whose largest entry is 1."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == "exp_avg").to(device)


def _blocks(at: slice) -> slice:
    return slice(at.start // _BLOCK, -(-at.stop // _BLOCK))


def _moment(state: dict[str, Any], name: str, at: slice) -> torch.Tensor:
    """Return the entries ``at`` of a moment in float32: its own memory, or a copy of what 8 bits stand for."""
    stored = state[name].view(-1)[at]
    if stored.dtype != torch.uint8:
        return stored
    from bitsandbytes.functional import dequantize_blockwise

    scale = state[f"{name}_scale"][_blocks(at)]
    return dequantize_blockwise(stored, absmax=scale, code=_codes(name, stored.device), blocksize=_BLOCK)


def _keep(state: dict[str, Any], name: str, at: slice, value: torch.Tensor) -> None:
    """Write the entries ``at`` of a moment back, where they are not its own memory."""
    stored = state[name].view(-1)[at]
    if stored.dtype != torch.uint8:
        return
    from bitsandbytes.functional import quantize_blockwise

    codes, made = quantize_blockwise(value, code=_codes(name, stored.device), blocksize=_BLOCK)
    stored.copy_(codes)
    state[f"{name}_scale"][_blocks(at)] = made.absmax
