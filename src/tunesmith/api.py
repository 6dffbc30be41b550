"""The public classes: composition, no logic. The contract of every argument is in ``docs/parameters.md``."""

from __future__ import annotations

import inspect
import logging
import os
import types
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.adapters.inject import (
    check_checkpointing,
    inject_adapter,
    set_checkpointing,
    train_all_weights,
)
from tunesmith.adapters.rows import as_rows
from tunesmith.adapters.settings import AdapterSettings
from tunesmith.adapters.state import load_source
from tunesmith.core.arguments import ANY, Idle, refuse_others
from tunesmith.core.device import dtype_to_train, parse_dtype
from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.core.settings import validate
from tunesmith.core.tasks import CAUSAL_LM, find_task
from tunesmith.core.versions import checkpoint_layers
from tunesmith.evaluation.fast import with_fast_generate, with_vllm
from tunesmith.export.methods import with_exports
from tunesmith.models.heads import Head, read_labels
from tunesmith.models.load import DEFAULT_WINDOW, facts_of
from tunesmith.models.qat import refuse_other_scheme
from tunesmith.models.rope import Stretch
from tunesmith.models.settings import ModelSettings, check_arguments, check_fp8, choose_width
from tunesmith.serving.vllm import vllm_options

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FastLanguageModel", "FastModel", "FastVisionModel", "get_chat_template"]

_log = logging.getLogger(__name__)


# Arguments of Unsloth's from_pretrained that nothing here could follow.
_OTHERS: Idle = {
    "unsloth_force_compile": (ANY, "nothing is compiled"),
    "fullgraph": (ANY, "nothing is compiled"),
    "fix_tokenizer": (ANY, "a tokenizer is taken as its files have it"),
    "use_exact_model_name": (ANY, "the name of a model is never made another"),
    "disable_log_stats": ((None, True), "vLLM's statistics are not shown"),
    "return_logits": ((None, False), "model(...) returns logits as in transformers, and a trainer needs none"),
    "text_only": ((None, False), "a model with eyes is loaded whole; FastLanguageModel gives its tokenizer alone"),
    "quantization_config": ((None,), "say load_in_4bit=True or load_in_8bit=True"),
    "unsloth_tiled_mlp": ((None, False), "use_gradient_checkpointing='unsloth' is what saves memory on long rows"),
    "float32_mixed_precision": ((None, False), "say dtype='float32'"),
    "whisper_language": ((None,), "models of audio are not trained here"),
    "whisper_task": ((None,), "models of audio are not trained here"),
    "target_parameters": ((None,), "it is an argument of get_peft_model"),
    "device_map_planner_kwargs": ((None,), "weights go where device_map says"),
}


def _refuse_unknown(function: Any, unknown: Mapping[str, Any], idle: Idle) -> None:
    known = [name for name in inspect.signature(function).parameters if name not in ("model", "unknown")]
    refuse_others(function.__name__, unknown, idle, known)


class FastLanguageModel:
    """Load a model, adapt it, switch it between training and generation.

    A vision-language model is loaded whole, with its tokenizer; :class:`FastVisionModel` gives its processor.
    """

    _with_processor: ClassVar[bool] = False

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        max_seq_length: int | None = DEFAULT_WINDOW,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        load_in_16bit: bool | None = None,
        full_finetuning: bool = False,
        *,
        max_sequence_length: int | None = None,
        token: str | None = None,
        device_map: Any = None,
        rope_scaling: Any = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        offload_embedding: bool = False,
        fast_inference: bool = False,
        gpu_memory_utilization: float = 0.5,
        float8_kv_cache: bool = False,
        random_state: int = 3407,
        max_lora_rank: int = 64,
        qat_scheme: Any = None,
        load_in_fp8: bool | str = False,
        attn_implementation: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        chat_template: str | None = None,
        task_type: str | None = None,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        auto_model: Any = None,
        torch_dtype: str | torch.dtype | None = None,
        **unknown: Any,
    ) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """Return ``(model, tokenizer)`` of a folder, .gguf file, hub id, adapter folder or built-in name.

        ``FastModel`` and ``FastVisionModel`` return the processor of a vision-language model in place of a tokenizer.

        Weights are 16-bit or 32-bit as ``dtype`` says; None picks what the hardware computes. ``load_in_4bit`` (NF4)
        and ``load_in_8bit`` quantize the linear layers of the decoder, which are computed in ``dtype``; ``load_in_fp8``
        ("row" or "block") stores them in float8 where a GPU has it. An adapter folder gives the base that it names with
        the adapter on it, ready to train on. With ``full_finetuning`` all weights train: give the model to the trainer
        as it is. There ``load_in_8bit`` stores them in int8, and ``load_in_4bit`` makes the result a 4-bit model; see
        :mod:`tunesmith.models.whole`. A ``max_seq_length`` above the model's own window stretches it as
        ``rope_scaling`` says ("linear", "dynamic", "yarn", "llama3" or rope parameters of transformers), up to four
        times also where nothing is said. ``resize_model_vocab`` gives embedding and head rows for added tokens, each
        the mean of the old ones. ``qat_scheme`` ("int8-int4", "int8", "int4", "fp8-int4", "fp8-fp8" or a config of
        torchao) makes full fine-tuning aware of that quantization: ``model.save_pretrained_torchao`` then saves what
        was trained; for an adapter give it to ``get_peft_model``.

        ``task_type`` is one of :data:`tunesmith.core.tasks.TASKS` (SEQ_CLS, TOKEN_CLS, SEQ_2_SEQ_LM, QUESTION_ANS,
        FEATURE_EXTRACTION; long names too). None takes what an adapter or a saved head is for, else CAUSAL_LM.
        ``num_labels``, ``id2label`` or ``label2id`` say how wide the head of a classifier is; ``random_state`` seeds
        weights that the files do not hold. ``auto_model`` is a class of transformers in place of the task's own,
        ``torch_dtype`` the older name of ``dtype``. ``unknown`` may hold arguments of Unsloth's that nothing here
        follows, with the values that ask for nothing.

        Raises:
            SettingsError: a value out of range, or one of ``unknown`` that asks for something.
            ModelError: the model is not found, its files are corrupt, or its window cannot be stretched so far.
            NotSupportedYetError: an argument together with a task for which it is not written yet.
            TypeError: an unknown argument; the message names the nearest.
        """
        given = dict(locals())
        _refuse_unknown(FastLanguageModel.from_pretrained, unknown, _OTHERS)
        if max_sequence_length is not None:
            # By identity: a 2048 that was asked for is another object than the default.
            if max_seq_length is not DEFAULT_WINDOW and max_seq_length != max_sequence_length:
                raise SettingsError("max_seq_length and max_sequence_length are the same setting. Give one of them.")
            max_seq_length = max_sequence_length
        own = check_arguments({**given, "max_seq_length": max_seq_length})
        if max_seq_length is not None and max_seq_length is not DEFAULT_WINDOW:
            max_seq_length = int(max_seq_length)  # numpy's go into no JSON
        options = vllm_options(
            fast_inference,
            {"gpu_memory_utilization": (gpu_memory_utilization, 0.5), "max_lora_rank": (max_lora_rank, 64),
             "float8_kv_cache": (float8_kv_cache, False)},
            {"full_finetuning": full_finetuning, "load_in_8bit": load_in_8bit,
             "load_in_fp8": load_in_fp8, "trust_remote_code": trust_remote_code,
             "resize_model_vocab": resize_model_vocab, "rope_scaling": rope_scaling, "auto_model": auto_model},
        )  # fmt: skip
        if device_map == "unsloth":
            raise SettingsError("device_map='unsloth': leave it out for one device, or give 'auto' for several.")
        if auto_model is not None and not hasattr(auto_model, "from_pretrained"):
            raise SettingsError(f"auto_model={auto_model!r} is no model class of transformers.")
        if torch_dtype is not None:
            if dtype is not None and parse_dtype(dtype) != parse_dtype(torch_dtype):
                raise SettingsError("dtype and torch_dtype are the same setting. Give one of them.")
            dtype = torch_dtype
        width = choose_width(
            load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, load_in_16bit=load_in_16bit, load_in_fp8=load_in_fp8,
            full_finetuning=full_finetuning, dtype=dtype,
        )  # fmt: skip
        check_fp8(width)
        check_checkpointing(use_gradient_checkpointing)
        task = None if task_type is None else find_task(task_type).name
        head = Head(task, read_labels(own.num_labels, own.id2label, own.label2id), auto_model, random_state)
        if full_finetuning and offload_embedding:
            raise SettingsError(
                "offload_embedding=True keeps a frozen embedding in host memory, and full_finetuning=True trains it. "
                "Give one of them."
            )
        asked = None if max_seq_length is DEFAULT_WINDOW else max_seq_length
        hub = {"token": token, "revision": revision, "cache_dir": own.cache_dir, "trust_remote_code": trust_remote_code,
               "local_files_only": local_files_only}  # fmt: skip
        hub = {name: value for name, value in hub.items() if value}
        model, tokenizer = load_source(
            model_name,
            max_seq_length=max_seq_length,
            dtype=dtype_to_train(dtype) if full_finetuning else dtype,
            chat_template=chat_template,
            attn_implementation=attn_implementation,
            device_map=device_map,
            vocabulary=resize_model_vocab,
            offload_embedding=offload_embedding,
            # Full fine-tuning starts from the whole weights, also where it stores them in fewer bits.
            width=None if full_finetuning else width,
            whole=bool(load_in_16bit),
            stretched=None if rope_scaling is None else Stretch(rope_scaling, asked),
            head=head,
            qat_scheme=None if full_finetuning else qat_scheme,
            with_processor=cls._with_processor,
            **hub,
        )
        if full_finetuning:
            train_all_weights(model, use_gradient_checkpointing, width=width, qat_scheme=qat_scheme)
        else:
            set_checkpointing(model, use_gradient_checkpointing)
        if options is not None:
            with_vllm(model, options, cache_dir=own.cache_dir, revision=revision)
        return _with_methods(model), tokenizer

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel | PeftModel,
        r: int = 16,
        target_modules: list[str] | tuple[str, ...] | str | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        finetune_last_n_layers: int | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: list[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
        temporary_location: str | os.PathLike[str] | None = None,
        qat_scheme: Any = None,
        target_parameters: list[str] | None = None,
        ensure_weight_tying: bool = False,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        exclude_modules: list[str] | str | None = None,
        init_data: Any = None,
        task_type: str | None = None,
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        finetune_audio_layers: bool = False,
        **unknown: Any,
    ) -> PeftModel:
        """Return ``model`` with a trainable LoRA adapter; see :class:`tunesmith.adapters.settings.AdapterSettings`.

        A model that was loaded with ``full_finetuning`` comes back as it is: only its checkpointing is set, and that
        is said. ``init_data`` are the rows that eva, corda and lora_ga start from: anything that a trainer takes.

        Raises:
            AdapterError: a target matches no layer, or the model already has an adapter with other settings.
            SettingsError: a value is of the wrong type or out of range; all problems at once.
        """
        given = dict(locals())
        _refuse_unknown(FastLanguageModel.get_peft_model, unknown, {})
        check_checkpointing(use_gradient_checkpointing)
        if not hasattr(model, "get_input_embeddings"):
            raise TypeError(f"get_peft_model() got a {type(model).__name__}; it takes a model of transformers or PEFT.")
        task = facts_of(model).task
        if task_type is not None and find_task(task_type).name != task:
            raise SettingsError(
                f"task_type={task_type!r}, but {type(model).__name__} is a model for {task}. Load it with "
                "from_pretrained(..., task_type=...), or leave task_type out."
            )
        if max_seq_length is not None:
            validate(
                ModelSettings, {"model": "", "max_seq_length": max_seq_length}, source="get_peft_model", strict=True
            )
        if max_seq_length is not None and max_seq_length > facts_of(model).window:
            raise SettingsError(
                f"max_seq_length={max_seq_length} is above the {facts_of(model).window} tokens that the model "
                "was loaded with. Give it to from_pretrained."
            )
        if facts_of(model).full_finetuning:
            refuse_other_scheme(model, qat_scheme)
            _log.warning("full_finetuning=True: all weights train, so get_peft_model adds no adapter.")
            set_checkpointing(model, use_gradient_checkpointing)
            return model  # type: ignore[return-value]
        chosen = {name: given[name] for name in AdapterSettings.model_fields}
        if isinstance(target_modules, tuple):
            chosen["target_modules"] = list(target_modules)
        if is_dataclass(loftq_config) and not isinstance(loftq_config, type):
            chosen["loftq_config"] = asdict(loftq_config)  # peft.LoftQConfig
        chosen["init_data"] = None
        rows = None if init_data is None else as_rows(model, init_data)
        settings = validate(AdapterSettings, chosen, source="get_peft_model")
        return _with_methods(inject_adapter(model, settings, rows, qat_scheme=qat_scheme))

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Switch to generation: evaluation mode, cache on, no checkpointing, padding on the left. Returns the model.

        The side is that of the tokenizer that came with the model, of one that generates from what it reads alone.
        """
        model.eval()
        model.config.use_cache = True
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        checkpoint_layers(base, False)
        facts = facts_of(model)
        if facts.tokenizer is not None and facts.task == CAUSAL_LM:
            facts.padding_side = facts.padding_side or facts.tokenizer.padding_side
            facts.tokenizer.padding_side = "left"
        return model

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Switch back to training, with padding where it was; None restores the model's checkpointing. Returns it."""
        model.train()
        facts = facts_of(model)
        if facts.tokenizer is not None and facts.padding_side is not None:
            facts.tokenizer.padding_side, facts.padding_side = facts.padding_side, None
        mode = facts.checkpointing if use_gradient_checkpointing is None else use_gradient_checkpointing
        set_checkpointing(model, mode)
        return model


def _with_methods(model: Any) -> Any:
    """Return ``model`` with what scripts call on it, as methods of this instance and of what a merge leaves of it."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        _with_methods(model.get_base_model())
    model.for_inference = types.MethodType(FastLanguageModel.for_inference, model)
    model.for_training = types.MethodType(FastLanguageModel.for_training, model)
    return with_fast_generate(with_exports(model))


class FastModel(FastLanguageModel):
    """The name that Unsloth uses for every architecture: a model with eyes comes with its processor."""

    _with_processor = True


class FastVisionModel(FastModel):
    """Vision-language models: ``from_pretrained`` gives ``(model, processor)``, ``get_peft_model`` filters by parts."""


_USUAL_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Give ``tokenizer``, or a processor, a chat template, and return it.

    Args:
        chat_template: a built-in name, a ``.jinja`` file, the template's own text, or a pair of that and its end of
            turn. Names of families (``llama-3.1``, ``qwen-2.5``, ``gemma-3`` ...) keep a tokenizer's own template of
            that family.
        mapping: None, or the usual names of keys and roles. Rows with ``from`` and ``value`` are read as they are.
        map_eos_token: taken, and without use: answers end at the template's end of turn and at the tokenizer's EOS.
        system_message: None; a system message belongs into the rows.

    Raises:
        SettingsError: no such template, another mapping, or a system message.
        ModelError: the tokenizer lacks tokens of the template.
    """
    from tunesmith.data.templates import apply_template, family_template

    if mapping is not None and any(_USUAL_MAPPING.get(key, value) != value for key, value in mapping.items()):
        raise SettingsError(
            f"mapping={dict(mapping)!r}: templates read role and content. Rows with from and value are trained on as "
            "they are; to render them yourself use standardize_sharegpt(dataset) first, and leave mapping out."
        )
    if system_message is not None:
        raise SettingsError("system_message: write it into the rows, as a first message with the role system.")
    if isinstance(chat_template, (tuple, list)):
        chat_template, end = chat_template
        own = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
        if end not in ("eos_token", True) and own.convert_tokens_to_ids(end) in (None, own.unk_token_id):
            raise ModelError(f"the tokenizer has no token {end!r}, which the template is said to end a turn with.")
    chosen = family_template(tokenizer, chat_template)
    if chosen is not None:
        apply_template(tokenizer, chosen)
    return tokenizer
