"""The optimizer: AdamW for weights that are stored in bfloat16, and the rate of embeddings.

A step of 2e-5 on a weight of 0.02 is a thousandth of it, and bfloat16 keeps eight bits: rounded to nearest, most steps
would be lost without a sign. Here the new weight is made in float32 and rounded up or down at random, up with the
probability of its place between the two, so that the weight is right on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tunesmith.core.errors import SettingsError

__all__ = ["StochasticAdamW", "give_embeddings_their_rate", "optimizer_for", "round_stochastically"]

_PIECE = 2**22
"""Entries updated at a time: what lies between is 16 MiB each, however large the embedding is."""


def optimizer_for(model: Any, args: Any) -> tuple[type, dict[str, Any]] | None:
    """Return class and arguments of the optimizer where the trained weights of ``model`` are 16-bit, else None.

    Raises:
        SettingsError: ``args.optim`` is another than AdamW, whose steps 16-bit weights would lose.
    """
    if not any(p.requires_grad and p.itemsize < 4 and p.is_floating_point() for p in model.parameters()):
        return None
    name = str(getattr(args.optim, "value", args.optim))
    if name not in ("adamw_torch", "adamw_torch_fused"):
        raise SettingsError(
            f"optim={name} on weights in 16 bits would lose most steps to rounding. Leave optim out (AdamW with "
            "stochastic rounding), or load the model with dtype='float32'."
        )
    return StochasticAdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "seed": args.seed,
    }


def give_embeddings_their_rate(optimizer: torch.optim.Optimizer, model: Any, rate: float | None) -> None:
    """Put the trained weights of embedding and output head of ``model`` into groups of their own.

    Their rate is ``rate``; None means a tenth of the others' beside an adapter, and the same where all weights train.

    Raises:
        SettingsError: a rate is given and neither of them trains.
    """
    if rate is None and not hasattr(model, "peft_config"):
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    chosen = {id(p) for module in modules if module is not None for p in module.parameters() if _is_whole(p, module)}
    if rate is not None and not chosen:
        raise SettingsError(
            "embedding_learning_rate has no effect: neither embedding nor output head trains. Name them in "
            "modules_to_save, or leave the rate out."
        )
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in chosen]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            optimizer.add_param_group({**group, "params": own, "lr": group["lr"] / 10 if rate is None else rate})


def _is_whole(parameter: torch.Tensor, module: Any) -> bool:
    """Return whether a trained weight is that of the module itself, and not of an adapter on it."""
    names = {id(p): name for name, p in module.named_parameters()}
    return parameter.requires_grad and "lora_" not in names[id(parameter)]


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
    a weight alone: every process draws the same, and a resumed run goes on as it would have.
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
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

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
                state[name] = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
        state["step"] += 1
        count, (beta1, beta2) = int(state["step"]), group["betas"]
        generator = torch.Generator(parameter.device).manual_seed(hash((self.seed, count, place)) % 2**63)
        rate, correction = group["lr"] / (1 - beta1**count), math.sqrt(1 - beta2**count)
        whole = (parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for weight, grad, mean, square in zip(*(x.reshape(-1).split(_PIECE) for x in whole), strict=True):
            grad = grad.float()
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            new = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
            new.addcdiv_(mean, square.sqrt().div_(correction).add_(group["eps"]), value=-rate)
            weight.copy_(round_stochastically(new, generator) if weight.dtype == torch.bfloat16 else new)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments as they were saved; torch would round them to the dtype of their weight."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if index in saved:
                    self.state[parameter][name] = saved[index][name].to(parameter.device, torch.float32).clone()
