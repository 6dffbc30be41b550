"""Settings of the adapter. Their meaning is the contract of ``get_peft_model``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

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
_TAKING_STARTS = re.compile(r"olora|pissa(_niter_\d+)?|corda|lora_ga")
_ROW_STARTS = ("eva", "corda", "lora_ga")
_LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}


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

    target_parameters: list[str] | None = None
    """Tensors of experts that get an adapter beside target_modules, where a mixture of experts keeps them in one:
    for example ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]. target_modules [] adapts these alone."""

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
        Literal["none", "lora_only", "all"],
        Guide("none", '"none": nothing is lost', "others: more parameters for little gain"),
    ] = "none"
    """Which biases train beside the adapter."""

    use_gradient_checkpointing: Annotated[
        bool | Literal["unsloth", "auto", "selective", "offload"],
        Guide(
            "unsloth", "false: fastest, most memory", "true: recomputes each layer, about a third slower, little memory"
        ),
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
    the quick form), "olora" (from a QR decomposition), "loftq" (see loftq_config), "eva" (directions of what goes into
    each layer), "corda" (of each weight, as far as inputs reach it), "lora_ga" (of the gradient), all three from
    init_data; False (both random, for tests). pissa, olora, corda and lora_ga take what they start with out of the
    base; the saved adapter belongs on the base as it was and has twice the rank."""

    init_data: str | None = None
    """Rows that eva, corda and lora_ga start from, read as data is: a file, a folder or a hub id, and best the training
    rows. The first 256 are looked at."""

    loftq_config: dict[str, int] | None = None
    """LoftQ (Li et al. 2023, arXiv:2310.08659): the base is rounded to loftq_bits (2: normal float in blocks of 64, 4:
    NF4, 8: LLM.int8; default 4) and A and B start with what that lost, in loftq_iter rounds (default 1). The rounded
    base is saved beside the adapter, in its folder base/, and belongs to it."""

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

    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    """Ranks for layers whose name matches, for example {"down_proj": 32}."""

    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = None
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

    @model_validator(mode="before")
    @classmethod
    def _a_config_of_loftq_sets_the_start(cls, values: Any) -> Any:
        start, config = values.get("init_lora_weights", True), values.get("loftq_config")
        if config and str(start).lower() == "true":
            return {**values, "init_lora_weights": "loftq"}
        return {**values, "loftq_config": _LOFTQ} if start == "loftq" and not config else values

    @field_validator("loftq_config", mode="before")
    @classmethod
    def _known_keys_and_bits(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value:
            return value or None
        for name, number in value.items():
            if name not in _LOFTQ:
                raise ValueError(f"unknown key {name!r}; these are {', '.join(_LOFTQ)}.{did_you_mean(name, _LOFTQ)}")
            if name == "loftq_bits" and str(number) not in ("2", "4", "8"):
                raise ValueError(f"loftq_bits={number!r} must be 2, 4 or 8")
            if name == "loftq_iter" and (isinstance(number, bool) or not str(number).isdigit() or int(number) < 1):
                raise ValueError(f"loftq_iter={number!r} must be a whole number of at least 1")
        return {**_LOFTQ, **value}

    @field_validator("layers_to_transform")
    @classmethod
    def _some_layer(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("it names no layer. Leave it out for all layers")
        return value

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _a_bool_is_no_number_here_either(cls, value: Any) -> Any:
        for name, number in value.items() if isinstance(value, dict) else ():
            if isinstance(number, bool):
                raise ValueError(f"{number} of {name!r} is a truth value, a number is needed")
        return value

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.loftq_config is not None and self.init_lora_weights != "loftq":
            raise ValueError(
                f"loftq_config and init_lora_weights={self.init_lora_weights!r} both say how the adapter starts. Give "
                "one of them."
            )
        return self

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _a_known_start(cls, value: Any) -> Any:
        # A flag is text.
        start = {"true": True, "false": False}.get(str(value).lower(), value)
        named = (*_PLAIN_STARTS, "loftq", *_ROW_STARTS)
        if isinstance(start, bool) or start in named or _TAKING_STARTS.fullmatch(str(start)):
            return start
        known = (*named, "olora", "pissa", "pissa_niter_16")
        raise ValueError(
            f"init_lora_weights={start!r} is not known. Use true, false, gaussian, orthogonal, pissa, pissa_niter_N "
            f"(with a number), olora, loftq, eva, corda or lora_ga.{did_you_mean(str(start), known)}"
        )

    @property
    def takes_from_base(self) -> bool:
        """Whether the start takes something out of the base, which the saved adapter has to hold."""
        return isinstance(self.init_lora_weights, str) and _TAKING_STARTS.fullmatch(self.init_lora_weights) is not None

    @property
    def needs_rows(self) -> bool:
        """Whether the start looks at rows of data."""
        return self.init_lora_weights in _ROW_STARTS

    @property
    def rounds_base(self) -> bool:
        """Whether the start replaces the base by one that is saved beside the adapter."""
        return self.init_lora_weights == "loftq"

    @property
    def filters(self) -> dict[str, bool]:
        """The value of each of :data:`FILTERS`."""
        return {name: getattr(self, name) for name in FILTERS}

    def arguments(self) -> dict[str, Any]:
        """Return the settings as keywords of ``get_peft_model``."""
        return {name: getattr(self, name) for name in AdapterSettings.model_fields}
