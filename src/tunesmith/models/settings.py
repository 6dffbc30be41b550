"""Settings that say which model is loaded and how. Their meaning is the contract of ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tunesmith.core.device import check_dtype_name, choose_device, computes_float8, parse_dtype
from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.core.settings import Guide, Settings, validate
from tunesmith.core.tasks import CAUSAL_LM, find_task
from tunesmith.models.rope import Stretch

if TYPE_CHECKING:
    import torch

__all__ = [
    "QAT_ALIASES",
    "LoadingArguments",
    "ModelSettings",
    "QatName",
    "Width",
    "asked_by",
    "check_arguments",
    "check_fp8",
    "choose_width",
    "is_float8",
]

Width = Literal["4bit", "8bit", "fp8", "fp8-block"]
"""How a base is stored when it is quantized: NF4 with double quantization, LLM.int8, or float8 e4m3 with a scale a row
or a block of 128 by 128."""

QatName = Literal["int8-int4", "phone-deployment", "int8", "int4", "fp8-int4", "fp8-fp8"]
"""A scheme of quantization-aware training; ``models/qat.py`` says what each one is."""
QAT_ALIASES = {"phone-deployment": "int8-int4"}


def choose_width(
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    load_in_16bit: bool | None = None,
    load_in_fp8: bool | str = False,
    full_finetuning: bool = False,
    dtype: str | torch.dtype | None = None,
) -> Width | None:
    """Return the width that was asked for, None for 16 or 32 bits.

    Raises:
        SettingsError: more than one was asked for, a ``load_in_fp8`` that there is not or that would train, or a
            ``load_in_16bit`` that ``dtype`` speaks against.
    """
    if load_in_fp8 not in (False, True, "row", "block"):
        raise SettingsError(f"load_in_fp8={load_in_fp8!r}: allowed are False, True, 'row' and 'block'.")
    asked = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "load_in_fp8": load_in_fp8,
             "load_in_16bit": load_in_16bit}  # fmt: skip
    names = [name for name, value in asked.items() if value]
    if len(names) > 1:
        raise SettingsError(f"{' and '.join(f'{name}={asked[name]!r}' for name in names)}: give one of them.")
    if load_in_fp8 and full_finetuning:
        raise SettingsError(
            f"load_in_fp8={load_in_fp8!r} stores a base that does not train, and full_finetuning=True trains it. Give "
            "one of them; load_in_8bit trains in one byte a weight."
        )
    # Only here: it needs torch, which reading settings does not.
    is_32bit = load_in_16bit is not None and dtype is not None and parse_dtype(dtype).itemsize > 2
    if load_in_16bit and is_32bit:
        raise SettingsError(f"load_in_16bit=True and dtype={dtype}: give one of them.")
    if load_in_16bit is False and not (is_32bit or names):
        raise SettingsError("load_in_16bit=False names no other precision. For 32 bit give dtype='float32'.")
    if load_in_fp8:
        return "fp8-block" if load_in_fp8 == "block" else "fp8"
    return "4bit" if load_in_4bit else "8bit" if load_in_8bit else None


def asked_by(width: Width) -> str:
    """Return the name of the argument that asks for ``width``."""
    return "load_in_fp8" if is_float8(width) else f"load_in_{width}"


def is_float8(width: Width | None) -> bool:
    """Return whether weights of ``width`` are float8."""
    return width in ("fp8", "fp8-block")


def check_fp8(width: Width | None) -> None:
    """Refuse a base in float8 where the hardware does not compute in it.

    Raises:
        ModelError: the hardware lacks it; the message says what is needed.
    """
    device = choose_device() if is_float8(width) else None
    if device is not None and not computes_float8(device):
        mode = "row" if width == "fp8" else "block"
        raise ModelError(
            f"load_in_fp8={mode!r} needs a GPU that computes in float8 (compute capability 8.9 or newer), and this "
            f"machine has none ({device.type}). load_in_8bit=True stores the base in as little memory."
        )


class LoadingArguments(Settings):
    """What ``from_pretrained`` takes beside :class:`ModelSettings`: for scripts, not for files of settings."""

    token: str | bool | None = None
    """Access token of the hub; none takes the one that `hf auth login` has stored."""

    device_map: Any = None
    """Where weights go, as in transformers; none: the GPU where there is one, else the CPU."""

    cache_dir: str | None = None
    """Folder of the hub's downloads; none takes the hub's own."""

    local_files_only: bool = False
    """Ask no hub, also where a name is no local folder."""

    fast_inference: bool = False
    """model.fast_generate answers through vLLM, a process of its own; refused where there is neither the
    package vllm nor the command."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the GPU that vLLM may take; only with fast_inference."""

    float8_kv_cache: bool = False
    """vLLM keeps keys and values in float8; only with fast_inference."""

    max_lora_rank: Annotated[int, Field(ge=1)] = 64
    """Largest rank of adapters that vLLM loads; only with fast_inference."""

    num_labels: int | None = None
    """Number of labels of a new classification head."""

    id2label: dict[int, str] | None = None
    """Names of the labels by their numbers, 0, 1, 2 ..."""

    label2id: dict[str, int] | None = None
    """The same the other way round."""

    auto_model: Any = None
    """A model class of transformers in place of the one that the task and the config choose."""

    torch_dtype: Any = None
    """The older name of dtype."""


class ModelSettings(Settings):
    """Which model, in which precision, with which window."""

    model: str
    """Folder, .gguf file, hub id, adapter folder (base and adapter are loaded), or a built-in name (smollm2-135m,
    minilm-l6)."""

    max_seq_length: Annotated[
        int | None,
        Field(ge=1),
        Guide(
            "512 to 2048",
            "rows longer than it are dropped",
            "costs memory; the model's own window is stretched, up to 4 times",
        ),
    ] = None
    """Longest training row and generation window in tokens; none means 2048, or the model's own where that is less."""

    dtype: Annotated[
        str | None,
        Guide("leave out", "16-bit halves memory and is faster where there are units for it", "float32 is exact"),
    ] = None
    """bfloat16, float16 (GPUs only) or float32. None lets the hardware decide and prints the reason: bfloat16 where it
    has units for it, else float16 on a GPU, where only an adapter trains, and float32."""

    task: str = CAUSAL_LM
    """What the model is trained for: CAUSAL_LM, SEQ_CLS, TOKEN_CLS, SEQ_2_SEQ_LM, QUESTION_ANS or FEATURE_EXTRACTION
    (also in words: sequence_classification, token_classification, seq2seq, question_answering). Labels are those of the
    training rows."""

    rope_scaling: str | dict[str, Any] | None = None
    """How to stretch the model's window to a longer max_seq_length: linear, dynamic, yarn, llama3, or a mapping of rope
    parameters of transformers. None: the model's own scheme made wider, or yarn, up to 4 times the own window."""

    resize_model_vocab: Annotated[int | None, Field(ge=1)] = None
    """Rows of embedding and output head, for tokens that were added to the tokenizer: at least as many as it has. New
    rows are the mean of the old; train them with modules_to_save embed_tokens and lm_head."""

    offload_embedding: bool = False
    """The embedding matrix stays in host memory and its rows are looked up there; for GPUs, and models whose output
    head is a tensor of its own."""

    load_in_4bit: Annotated[
        bool,
        Guide("on for large models", "the base is whole", "a third of a 16-bit base; small models lose"),
    ] = False
    """QLoRA: the decoder's linear layers in NF4 with double quantization (bitsandbytes), computed in dtype. With
    full_finetuning: their weights stay in dtype and are rounded to NF4 wherever they compute, so that the result is a
    4-bit model."""

    load_in_8bit: Annotated[
        bool, Guide("where 4 bits cost too much quality", "the base is whole", "about half of the base's memory")
    ] = False
    """The decoder's linear layers in 8 bits (bitsandbytes LLM.int8), computed in dtype. With full_finetuning: stored in
    int8, rounded at random in each step (torchao), and states of the optimizer in 8 bits; the result is a plain
    model."""

    load_in_fp8: Annotated[
        bool | Literal["row", "block"],
        Guide("on where a GPU has it", "false: the base is whole", "row and block: half of a 16-bit base's memory"),
    ] = False
    """The decoder's linear layers in float8 (e4m3), frozen: "row" (or true) with a scale a row, "block" with a scale a
    block of 128 by 128. Needs a GPU of compute capability 8.9 or newer."""

    load_in_16bit: bool = False
    """The base whole, also under an adapter that was trained on a quantized one; the default for everything else."""

    full_finetuning: Annotated[
        bool,
        Guide(
            "off: adapters learn as well for less",
            "an adapter trains",
            "4 times the base; a rate 10 times lower",
        ),
    ] = False
    """All weights train, no adapter; the run's result is a whole model."""

    qat_scheme: Annotated[
        QatName | None,
        Guide(
            "int8-int4, for phones",
            "none: the model loses when it is quantized later",
            "a scheme: slower steps, no fused layers",
        ),
    ] = None
    """Quantization-aware training: linear layers compute with what torchao will leave of their weights, so that the
    quantized model is the one that was trained. int8-int4 (int8 activations, int4 weights in groups of 32; alias
    phone-deployment), int8 (weights), int4 (weights, groups of 128), fp8-int4 or fp8-fp8. The last three are converted
    on GPUs only."""

    chat_template: str | None = None
    """Built-in name (chatml, llama-3, gemma, mistral) or a .jinja file, for base models without a template."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Only for repositories that you have read."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    attn_implementation: str | None = None
    """sdpa, eager or flash_attention_2 as in transformers; none uses the library's attention per document."""

    @field_validator("task")
    @classmethod
    def _a_known_task(cls, value: str) -> str:
        return find_task(value).name

    @field_validator("dtype")
    @classmethod
    def _a_known_dtype(cls, value: str | None) -> str | None:
        try:
            check_dtype_name(value or "float32")
        except ModelError as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def width(self) -> Width | None:
        """How the base is quantized, None where it is not."""
        return choose_width(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            load_in_16bit=self.load_in_16bit or None,
            load_in_fp8=self.load_in_fp8,
            full_finetuning=self.full_finetuning,
            dtype=self.dtype,
        )

    def stretched(self, window: int | None) -> Stretch | None:
        """How the window is made ``window`` tokens long, None where it is not stretched."""
        return None if self.rope_scaling is None else Stretch(self.rope_scaling, window)

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        try:
            width = self.width
        except (ModelError, SettingsError) as error:
            raise ValueError(str(error)) from error
        if width is not None and self.qat_scheme is not None:
            raise ValueError(f"qat_scheme and {asked_by(width)} both round the weights. Give one of them.")
        return self


# Arguments of from_pretrained that are what the settings are; the others are looked at where they are used.
_SAME = ("max_seq_length", "load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning", "offload_embedding",
         "trust_remote_code", "revision")  # fmt: skip


def check_arguments(given: Mapping[str, Any]) -> LoadingArguments:
    """Check the types of the arguments of ``from_pretrained``, None for those left out; return what is no setting.

    Raises:
        SettingsError: a value is of another type (a text is no number and no truth value) or out of range.
    """
    same = {name: given[name] for name in _SAME if given[name] is not None}
    validate(ModelSettings, {"model": "", **same}, source="from_pretrained", strict=True)
    own = {name: given[name] for name in LoadingArguments.model_fields}
    return validate(LoadingArguments, own, source="from_pretrained")
