"""Models from any source with what belongs to them, and adapters on disk: plain PEFT folders and their bases.

:func:`load_source` is the one place that puts base, adapter and tokenizer together.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.adapters.config import arguments_of
from tunesmith.adapters.inject import refuse_beside_rounding
from tunesmith.adapters.model import as_adapter_model, base_beside, refuse_quantized, trained_for, trained_on
from tunesmith.adapters.starts import read_config, refuse_lost_base
from tunesmith.core.errors import AdapterError, ModelError, SettingsError
from tunesmith.core.tasks import CAUSAL_LM
from tunesmith.models.aliases import ALIASES, ModelSource, find_model
from tunesmith.models.heads import Head, give_padding
from tunesmith.models.load import (
    DEFAULT_WINDOW,
    empty_causal_lm,
    facts_of,
    load_model,
    load_tokenizer,
    load_window,
    source_sees,
)
from tunesmith.models.prompts import set_ends
from tunesmith.models.qat import prepare, scheme_of
from tunesmith.models.rope import Stretch
from tunesmith.models.settings import Width, is_float8
from tunesmith.models.vision import has_vision

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "attach_adapter",
    "attach_as_trained",
    "base_of",
    "empty_source",
    "load_beside",
    "load_source",
    "load_source_tokenizer",
    "own_tokenizer",
    "refuse_other_base",
]

_log = logging.getLogger(__name__)

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def load_source(
    name: str,
    *,
    adapter: str | None = None,
    max_seq_length: int | None = DEFAULT_WINDOW,
    dtype: str | torch.dtype | None = None,
    chat_template: str | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    width: Width | None = None,
    whole: bool = False,
    stretched: Stretch | None = None,
    head: Head | None = None,
    vocabulary: int | None = None,
    offload_embedding: bool = False,
    qat_scheme: Any = None,
    trainable: bool = True,
    attach: bool = True,
    with_processor: bool = False,
    **hub: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer of whatever ``name`` means, an adapter on the base that it names.

    Args:
        adapter: name of an adapter to put on the base ``name``.
        width: how the base is quantized; None: as the adapter was trained, else not at all.
        whole: not quantized, whatever the adapter was trained on.
        stretched: how the window is made longer; None: as the adapter was trained, else not at all.
        head: task and labels; None: as the adapter was trained, else as the files have them.
        vocabulary: rows of embedding and head; None: as the adapter was trained, else the model's own.
        offload_embedding: whether the embedding stays in host memory.
        qat_scheme: what an adapter is trained on for; None: what it was trained for, unless ``whole``.
        trainable: whether the adapter's weights take gradients.
        attach: false gives the base alone, as the adapter wants it, with the base's own tokenizer; with the adapter's
            where that has no chat template, or another one is asked for, which may need tokens of the adapter's.
        with_processor: give the processor of a vision-language model in place of its tokenizer.
        hub: see :func:`tunesmith.models.load.load_model`, as the other arguments.

    Raises:
        ModelError: the model or the adapter's base cannot be found or loaded.
        AdapterError: ``adapter`` is none, ``name`` is one already, was trained for another task, or it does not fit
            its base.
    """
    base, folder = _parts(name, adapter)
    head = _head_as_trained(folder, head or Head())
    width, stretched, max_seq_length = _as_trained(folder, width, whole, stretched, max_seq_length)
    vocabulary = _rows(folder, vocabulary)
    has_own_tokenizer = folder is not None and _has_tokenizer(folder)
    model, tokenizer = load_model(
        base,
        max_seq_length=max_seq_length,
        dtype=dtype,
        # It may need tokens that only the adapter's tokenizer has.
        chat_template=None if has_own_tokenizer else chat_template,
        attn_implementation=attn_implementation,
        device_map=device_map,
        width=width,
        whole=whole,
        stretched=stretched,
        head=head,
        vocabulary=vocabulary,
        offload_embedding=offload_embedding,
        with_processor=with_processor,
        **hub,
    )
    if folder is None:
        if chat_template is not None and facts_of(model).task == CAUSAL_LM:
            set_ends(model, tokenizer)
        if qat_scheme is not None:
            raise SettingsError(
                f"qat_scheme={qat_scheme!r} trains all weights of a base: give full_finetuning=True. To train an "
                "adapter, give it to get_peft_model."
            )
        return model, tokenizer
    if has_own_tokenizer and (attach or chat_template is not None or not tokenizer.chat_template):
        sees = with_processor and has_vision(model.config)
        owner = folder if not sees or _has_processor(folder) else base
        tokenizer = load_tokenizer(owner, chat_template=chat_template, with_processor=sees, **hub)
        facts_of(model).tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if facts_of(model).task == CAUSAL_LM:
            set_ends(model, tokenizer)
        elif tokenizer.pad_token_id is not None:
            give_padding(model, tokenizer)
    if attach:
        model = attach_as_trained(model, folder, qat_scheme, whole=whole, trainable=trainable)
    return model, tokenizer


def attach_as_trained(
    model: PreTrainedModel, adapter: ModelSource, qat_scheme: Any = None, *, whole: bool = False, trainable: bool = True
) -> PeftModel:
    """Load an adapter onto its base, which computes as it did in training; see :func:`load_source`."""
    _round_as_trained(model, adapter, qat_scheme, whole)
    return attach_adapter(model, Path(adapter.path), trainable=trainable)


def empty_source(
    name: str,
    *,
    max_seq_length: int | None = DEFAULT_WINDOW,
    width: Width | None = None,
    whole: bool = False,
    stretched: Stretch | None = None,
    vocabulary: int | None = None,
    **arguments: Any,
) -> tuple[PreTrainedModel | PeftModel, ModelSource]:
    """Return what :func:`load_source` would give ``name``, with shapes and no values, and where its base lies.

    ``arguments`` are those of :func:`tunesmith.models.load.empty_causal_lm`.
    """
    base, folder = _parts(name, None)
    width, stretched, max_seq_length = _as_trained(folder, width, whole, stretched, max_seq_length)
    model = empty_causal_lm(
        base,
        max_seq_length=max_seq_length,
        width=width,
        stretched=stretched,
        vocabulary=_rows(folder, vocabulary),
        **arguments,
    )
    if folder is None:
        return model, base
    from peft import PeftConfig, get_peft_model

    _round_as_trained(model, folder, None, whole)
    facts = facts_of(model)
    config: Any = PeftConfig.from_pretrained(folder.path)
    adapted = get_peft_model(model, config)
    facts.adapter = arguments_of(config)
    adapted.tunesmith_facts = facts  # type: ignore[assignment]
    return adapted, base  # type: ignore[return-value]


def load_source_tokenizer(
    name: str,
    *,
    max_seq_length: int | None = DEFAULT_WINDOW,
    stretched: Stretch | None = None,
    chat_template: str | None = None,
    with_processor: bool = False,
    **hub: Any,
) -> tuple[PreTrainedTokenizerBase, int]:
    """Return the tokenizer and the window that :func:`load_source` would give ``name``, without loading weights.

    Raises:
        AdapterError: it was trained for another task than ``CAUSAL_LM``.
        ModelError: it cannot be read, or writes no text.
    """
    base, folder = _parts(name, None)
    task = CAUSAL_LM if folder is None else read_config(Path(folder.path)).get("task_type") or CAUSAL_LM
    if task != CAUSAL_LM:
        raise AdapterError(
            f"adapter {name} was trained for {task}: rows and memory are shown for models that write. `tunesmith train "
            f"--task {task}` shows what becomes of its rows."
        )
    sees = with_processor and source_sees(base, **hub)
    has_own = _has_processor if sees else _has_tokenizer
    owner = folder if folder is not None and has_own(folder) else base
    tokenizer = load_tokenizer(owner, chat_template=chat_template, with_processor=sees, **hub)
    _, stretched, max_seq_length = _as_trained(folder, None, True, stretched, max_seq_length)
    return tokenizer, load_window(base, max_seq_length, stretched=stretched, **hub)


def _as_trained(
    folder: ModelSource | None, width: Width | None, whole: bool, stretched: Stretch | None, window: int | None
) -> tuple[Width | None, Stretch | None, int | None]:
    """Return how the base of an adapter is quantized and stretched and its window, where nothing else is asked for."""
    if folder is None:
        return width, stretched, window
    own = trained_on(Path(folder.path))
    own_width, own_stretch = own.width, own.stretch
    if own_width is not None and width is None and not whole:
        width = own_width
        _log.warning(
            "the base is loaded in %s, as the adapter %s was trained on it; load_in_16bit loads it whole",
            "float8" if is_float8(width) else f"{width.removesuffix('bit')} bits",
            folder.name,
        )
    if own_stretch is not None and stretched is None:
        stretched = own_stretch
        window = own_stretch.window if window is DEFAULT_WINDOW else window
        if None not in (window, own_stretch.window) and window > own_stretch.window:  # type: ignore[operator]
            raise AdapterError(
                f"max_seq_length={window} is above the window of {own_stretch.window} tokens that the adapter "
                f"{folder.name} was trained with: its positions would mean something else. Ask for at most that."
            )
    return width, stretched, window


def _head_as_trained(folder: ModelSource | None, head: Head) -> Head:
    """Return ``head`` with the task and the labels of the adapter in ``folder``, and refuse others."""
    if folder is None:
        return head
    task = read_config(Path(folder.path)).get("task_type") or CAUSAL_LM
    labels = trained_on(Path(folder.path)).labels
    if head.task not in (None, task):
        raise AdapterError(f"adapter {folder.name} was trained for {task}, not for {head.task}. Ask for {task}.")
    if labels is not None and head.labels not in (None, labels) and not head.gives_way:
        raise AdapterError(f"adapter {folder.name} was trained with the labels {', '.join(labels)}. Leave others out.")
    return replace(head, task=task, labels=labels or head.labels)


def _rows(folder: ModelSource | None, asked: int | None) -> int | None:
    """Return the rows of the vocabulary that an adapter was trained with, where nothing else is asked for."""
    own = None if folder is None else trained_on(Path(folder.path)).vocabulary
    if folder is not None and asked is not None and asked != own:
        raise AdapterError(
            f"resize_model_vocab={asked}, but the adapter {folder.name} was trained "
            f"{'with the own vocabulary of its base' if own is None else f'with {own} rows'}. Leave it out."
        )
    return own if asked is None else asked


def _round_as_trained(model: Any, folder: ModelSource, asked: Any, whole: bool) -> None:
    """Make the base of an adapter compute as the scheme says that it was, or is to be, trained for."""
    scheme = asked
    if scheme is None and not whole:
        scheme = trained_for(Path(folder.path))
        if scheme is not None:
            _log.warning(
                "the model computes as %s will, as the adapter %s was trained for it; load_in_16bit does not round",
                scheme_of(scheme).name,
                folder.name,
            )
    if scheme is not None:
        prepare(model, scheme)


def _parts(name: str, adapter: str | None) -> tuple[ModelSource, ModelSource | None]:
    """Return where base and adapter lie."""
    source = find_model(name)
    if adapter is None:
        if source.kind != "adapter":
            return source, None
        _refuse_unreadable(source)
        return base_of(Path(source.path)), source
    beside = find_model(adapter)
    if beside.kind != "adapter":
        raise AdapterError(f"adapter {adapter} is no adapter: it holds no {_CONFIG}. Give a run's folder.")
    _refuse_unreadable(beside)
    if source.kind == "adapter":
        raise AdapterError(f"model {name} already is an adapter on its base. Leave the adapter out, or name the base.")
    return source, beside


def _refuse_unreadable(adapter: ModelSource) -> None:
    """PEFT has other kinds (IA3, LoHa, prompts ...), whose layers nothing here reads."""
    kind = read_config(Path(adapter.path)).get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(
            f"adapter {adapter.name} is of the kind {kind}; only LORA is loaded. Merge it with PEFT "
            "(merge_and_unload) where its kind allows that, and load the merged model."
        )
    _require_weights(Path(adapter.path))


def _require_weights(adapter: Path) -> None:
    if (adapter / _WEIGHTS).is_file():
        return
    if (adapter / _PICKLE).is_file():
        raise AdapterError(
            f"{adapter} holds {_PICKLE}, a pickle, which can run code when it is read: only {_WEIGHTS} is read. Load "
            "it with PEFT where you trust it, and save it again with save_pretrained."
        )
    raise AdapterError(f"{adapter}: {_WEIGHTS} is missing. Copy the adapter again.")


def _has_tokenizer(adapter: ModelSource) -> bool:
    """Say whether an adapter was saved with the tokenizer that it was trained with, which then is the one to use."""
    return (Path(adapter.path) / "tokenizer_config.json").is_file()


def _has_processor(adapter: ModelSource) -> bool:
    return any((Path(adapter.path) / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def base_of(adapter: Path) -> ModelSource:
    """Return the source of the base model that an adapter folder names.

    Raises:
        AdapterError: adapter_config.json is missing, unreadable or names no base, or the weights are missing.
        ModelError: the base is not found where the adapter says it is.
    """
    config = read_config(adapter)
    _require_weights(adapter)
    own = base_beside(adapter)
    if own is not None:
        return ModelSource("folder", str(own), str(own))
    file, base = adapter / _CONFIG, config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise AdapterError(f"{file} names no base model. Load the base and give the adapter beside it.")
    try:
        return find_model(base)
    except ModelError as error:
        packaged = _alias_of(base)
        if packaged is not None:
            return find_model(packaged)
        raise ModelError(
            f"adapter {adapter}: its base {base!r} is not there. Put the base back, or write its place into "
            f"{file} as base_model_name_or_path."
        ) from error


def attach_adapter(model: PreTrainedModel, adapter: Path, *, trainable: bool = True) -> PeftModel:
    """Load an adapter folder onto its base.

    Raises:
        AdapterError: the weights are corrupt, or do not fit the base (other names or shapes), or are incomplete, or
            belong to a base that only the training had.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    from tunesmith.engine.lora import fused_lora

    refuse_lost_base(adapter)
    try:
        # PEFT repeats a start that took something out of the base (pissa, olora) from the base alone.
        config: Any = PeftConfig.from_pretrained(str(adapter))
        # PEFT alone would make a model of it that cannot generate.
        config.task_type = config.task_type or facts_of(model).task
        own = base_beside(adapter)
        if own is not None:
            config.base_model_name_or_path = str(own.absolute())  # wherever the folder has been moved to
        if str(config.init_lora_weights).startswith(("pissa", "olora")):
            refuse_quantized(model)
        if facts_of(model).qat is not None:
            refuse_beside_rounding(config)
        adapted = PeftModel.from_pretrained(model, str(adapter), config=fused_lora(config), is_trainable=trainable)
    except SafetensorError as error:
        raise AdapterError(
            f"{adapter / _WEIGHTS} is corrupt or cut short ({error}). Copy the adapter again."
        ) from error
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = next((line for line in lines if not line.endswith(":")), type(error).__name__)
        raise AdapterError(f"adapter {adapter} does not fit its base {facts_of(model).name}: {first[:300]}") from error
    _refuse_foreign_keys(adapter, adapted)
    facts = facts_of(model)
    facts.adapter = arguments_of(config)
    adapted.tunesmith_facts = facts
    return as_adapter_model(adapted)


def load_beside(model: PeftModel, name: str, adapter: Path) -> None:
    """Load one more adapter onto the base of ``model``, switched off, to be chosen by ``set_adapter``.

    Raises:
        AdapterError: it does not fit the base, or one of the two changed the base for itself.
    """
    _require_weights(adapter)
    refuse_other_base(name, adapter, model)
    try:
        model.load_adapter(str(adapter), name, is_trainable=False)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"adapter {adapter} does not fit its base {facts_of(model).name}: {error}") from error


def own_tokenizer(name: str, adapter: Path, shared: Any) -> Any:
    """Return the tokenizer that an adapter was saved with, None where it reads and writes as ``shared`` does.

    Raises:
        AdapterError: its vocabulary is another than that of ``shared``; either may have tokens more.
    """
    if not any((adapter / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return None
    own = load_tokenizer(find_model(str(adapter)))
    ids, known = own.get_vocab().items(), shared.get_vocab().items()
    if not (known <= ids or ids <= known):
        raise AdapterError(
            f"adapter {name} was trained with another vocabulary than the base has. Merge it (tunesmith export) and "
            "use the merged model."
        )
    same = ids == known and own.chat_template == shared.chat_template and own.eos_token == shared.eos_token
    return None if same else own


def refuse_other_base(name: str, adapter: Path, model: Any) -> None:
    """Raise where an adapter was trained with another vocabulary or other positions than the loaded base has.

    Raises: AdapterError.
    """
    own, facts = trained_on(adapter), facts_of(model)
    if own.vocabulary != facts.vocabulary:
        raise AdapterError(
            f"adapter {name} was trained with {own.vocabulary or 'the own'} rows of vocabulary, the base has "
            f"{facts.vocabulary or 'its own'}. Load it by itself, or merge it (tunesmith export)."
        )
    if own.stretch != facts.stretch:
        window = f"a window of {own.stretch.window} tokens" if own.stretch else "the own window of its base"
        raise AdapterError(
            f"adapter {name} was trained with {window}, which the base does not have here: positions would mean "
            "something else. Load it by itself, or merge it (tunesmith export)."
        )


def _refuse_foreign_keys(adapter: Path, adapted: PeftModel) -> None:
    """PEFT only warns about tensors that fit nothing and leaves missing ones random."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(str(adapter / _WEIGHTS), framework="pt") as opened:
        stored = set(opened.keys())
    expected = set(get_peft_model_state_dict(adapted))
    if stored != expected:
        extra, missing = sorted(stored - expected), sorted(expected - stored)
        what = f"{len(missing)} tensors are missing ({missing[0]})" if missing else f"{len(extra)} unknown ({extra[0]})"
        raise AdapterError(f"adapter {adapter} does not fit its base: {what}.")


def _alias_of(base: str) -> str | None:
    """Return the built-in name whose folder ``base`` was, when the cache was emptied or the package moved since."""
    place = Path(base)
    for name, packaged in ALIASES.items():
        file = Path(packaged.file)
        if file.suffix and place.name.startswith(file.stem):
            return name
        if not file.suffix and place.parts[-2:] == (packaged.module, packaged.file):
            return name
    return None
