"""Settings of the adapter. Their meaning is the contract of ``get_peft_model``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tunesmith.core.names import did_you_mean
from tunesmith.core.settings import Guide, Settings

__all__ = ["FILTERS", "AdapterSettings"]

FILTERS = (
    "finetune_vision_layers",
    "finetune_language_layers",
    "finetune_attention_modules",
    "finetune_mlp_modules",
    "finetune_audio_layers",
)
"""The settings that choose parts of a multimodal model."""

_PLAIN_STARTS = ("gaussian", "orthogonal")
_TAKING_STARTS = re.compile(r"olora|pissa(_niter_\d+)?")
_OTHER_STARTS = {
    "eva": "starts from rows of data",
    "corda": "starts from rows of data",
    "lora_ga": "starts from rows of data",
    "loftq": "quantizes the base",
}


class AdapterSettings(Settings):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): y = x W' + scale * (dropout(x) A') B'."""

    r: Annotated[
        int,
        Field(ge=1),
        Guide(
            "4 to 128; 8, 16, 32, 64 and 128 are usual",
            "underfits: too little capacity for the task",
            "overfits and costs memory; from 128 on only with rsLoRA and a lower learning rate",
        ),
    ] = 16
    """Rank: width of A and B, the adapter's capacity."""

    target_modules: Annotated[
        list[str] | str | None,
        Guide(
            "leave out, or all-linear", "attention only: weaker on new facts", "all linear layers: the strong default"
        ),
    ] = None
    """Which linear layers get an adapter: names, "all-linear" or a regular expression; none means q, k, v, o, gate,
    up and down projections or the family's equivalents."""

    lora_alpha: Annotated[
        float,
        Field(gt=0),
        Guide("r or 2 r", "weak updates: the base shows through", "unstable: the loss jumps or diverges"),
    ] = 16
    """Numerator of the adapter's scale (alpha / r)."""

    lora_dropout: Annotated[
        float,
        Field(ge=0, lt=1),
        Guide("0; 0.05 to 0.1 on small data, up to 0.2", "may overfit on few rows", "learns slowly"),
    ] = 0.0
    """Dropout on the adapter's input; 0 is fastest."""

    bias: Annotated[
        Literal["none", "lora_only", "all"], Guide("none", "nothing is lost", "more parameters for little gain")
    ] = "none"
    """Which biases train beside the adapter."""

    use_gradient_checkpointing: Annotated[
        bool | Literal["unsloth", "auto", "selective", "offload"],
        Guide("unsloth", "off: fastest, most memory", "on: recomputes each layer, about a third slower, little memory"),
    ] = "unsloth"
    """What layers keep for the backward pass: False all of it, True their inputs, "selective" what is costly to compute
    again, "offload" nothing (inputs go to host memory, on a CPU to a file). "unsloth" is the fastest mix with a
    predicted peak of at most 0.7 of transformers' own checkpointing, "auto" the fastest that fits the memory there is;
    see `tunesmith plan`."""

    temporary_location: str | None = None
    """Folder for what is offloaded to disk; made when needed, removed after. None: the system's temporary folder."""

    random_state: Annotated[int, Field(ge=0)] = 3407
    """Seeds A; two runs with one seed start from equal adapters."""

    use_rslora: Annotated[
        bool, Guide("on for r >= 32", "scale alpha / r shrinks as r grows", "scale alpha / sqrt(r)")
    ] = False
    """Rank-stabilized scale alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""

    use_dora: Annotated[bool, Guide("off", "plain LoRA", "slower, sometimes better at low rank")] = False
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353)."""

    init_lora_weights: bool | str = True
    """Start of A and B: True (A Kaiming, B zero), "gaussian" (A normal, B zero), "orthogonal" (two subspaces, B A is
    zero), "pissa" or "pissa_niter_N" (the largest singular directions of each weight; N is the number of iterations of
    the quick form), "olora" (from a QR decomposition), False (both random, for tests). pissa and olora take what they
    start with out of the base; the saved adapter belongs on the base as it was and has twice the rank."""

    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter: embed_tokens and lm_head, a classifier head."""

    ensure_weight_tying: bool = False
    """Where embedding and output head are one tensor: keep them one when modules_to_save trains them."""

    layers_to_transform: list[int] | int | None = None
    """Indices of the only layers that get an adapter."""

    layers_pattern: list[str] | str | None = None
    """Name of the layer list that layers_to_transform counts in, where PEFT cannot tell."""

    finetune_last_n_layers: Annotated[int | None, Field(ge=1)] = None
    """Adapt only the last n layers."""

    rank_pattern: dict[str, int] | None = None
    """Ranks for layers whose name matches, for example {"down_proj": 32}."""

    alpha_pattern: dict[str, float] | None = None
    """Alphas for layers whose name matches."""

    exclude_modules: list[str] | str | None = None
    """Layers that target_modules matches and that still get no adapter."""

    finetune_vision_layers: bool = True
    """Multimodal models: adapters on what sees; on its projector only where target_modules names it, or all-linear."""

    finetune_language_layers: bool = True
    """Multimodal models: adapters on the language model."""

    finetune_attention_modules: bool = True
    """Multimodal models: adapters on attention, in the parts that are on."""

    finetune_mlp_modules: bool = True
    """Multimodal models: adapters on MLPs, in the parts that are on."""

    finetune_audio_layers: bool = False
    """Multimodal models: adapters on what hears."""

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _a_known_start(cls, value: Any) -> Any:
        # A flag is text.
        start = {"true": True, "false": False}.get(str(value).lower(), value)
        if isinstance(start, bool) or start in _PLAIN_STARTS or _TAKING_STARTS.fullmatch(str(start)):
            return start
        if start in _OTHER_STARTS:
            raise ValueError(f"init_lora_weights={start!r} {_OTHER_STARTS[start]}, which is not supported yet.")
        known = (*_PLAIN_STARTS, "olora", "pissa", "pissa_niter_16", *_OTHER_STARTS)
        raise ValueError(
            f"init_lora_weights={start!r} is not known. Use true, false, gaussian, orthogonal, pissa, pissa_niter_N "
            f"(with a number) or olora.{did_you_mean(str(start), known)}"
        )

    @property
    def takes_from_base(self) -> bool:
        """Whether the start changes the weights of the base."""
        return isinstance(self.init_lora_weights, str) and _TAKING_STARTS.fullmatch(self.init_lora_weights) is not None

    @property
    def filters(self) -> dict[str, bool]:
        """The value of each of :data:`FILTERS`."""
        return {name: getattr(self, name) for name in FILTERS}

    def arguments(self) -> dict[str, Any]:
        """Return the settings as keywords of ``get_peft_model``."""
        return {name: getattr(self, name) for name in AdapterSettings.model_fields}
