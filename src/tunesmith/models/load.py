"""Load a model, by default a language model with or without eyes, and its tokenizer or processor from any source.

Reads local files first and asks the network only for hub ids. The dtype comes with its reason. Read next:
``aliases.py`` (what a name means), ``gguf_cache.py`` (GGUF files), ``adapters/state.py`` (adapter folders).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.device import DtypeChoice, choose_device, choose_dtype, dtype_to_train
from tunesmith.core.errors import ModelError, NotSupportedYetError, SettingsError
from tunesmith.core.memory import forget_pages, limit_kernel_caches, trim_heap
from tunesmith.core.seeds import seeded
from tunesmith.core.tasks import CAUSAL_LM, task_of
from tunesmith.core.versions import keep_softcap
from tunesmith.engine.host import check_not_tied, keep_on_host
from tunesmith.models.aliases import ModelSource
from tunesmith.models.gguf_cache import converted_gguf
from tunesmith.models.heads import Head, give_padding
from tunesmith.models.quantize import (
    float8_notes,
    keep_activations,
    make_quantized,
    protect_gradients,
    quantization_config,
    reading_once,
    to_float8,
    width_of,
)
from tunesmith.models.readable import readable_errors, refuse_encoder, refuse_missing_weights
from tunesmith.models.rope import Stretch, automatic, native_window, stretch
from tunesmith.models.settings import Width, asked_by, check_fp8, is_float8
from tunesmith.models.vision import NOT_FUSED, auto_class, has_vision, outside_decoder
from tunesmith.models.vocabulary import check_vocabulary, grow_vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_WINDOW",
    "ModelFacts",
    "empty_causal_lm",
    "facts_of",
    "load_model",
    "load_tokenizer",
    "load_window",
    "local_place",
    "source_sees",
    "stored_bytes",
]


_log = logging.getLogger(__name__)

# Kind of model -> linear layers that are not quantized: the head, and those whose weights its own code reads.
_READ_WHOLE = {kind: ["lm_head", "dt_proj", "out_proj"] for kind in ("mamba", "falcon_mamba")}


class _DefaultWindow(int):
    """A window that nobody asked for: it gives way to the model's own shorter one; a number asked for is refused."""


DEFAULT_WINDOW: int = _DefaultWindow(2048)

# Where nothing is said, transformers asks on the terminal whether to run a model's own code.
_NO_CODE = {"trust_remote_code": False}


@dataclass(slots=True)
class ModelFacts:
    """What was decided when a model was loaded; kept on the model instance as ``tunesmith_facts``.

    Attributes:
        name: how the user called the model.
        dtype: dtype of the weights with its reason.
        window: longest sequence in tokens that this model is used with.
        notes: lines for the banner (a fast path refused).
        adapter: the arguments of ``get_peft_model``, None before it.
        checkpointing: ``use_gradient_checkpointing`` as it was asked for.
        width: of the quantized layers of the base, None where it is not quantized.
        full_finetuning: whether all weights train.
        qat: the scheme that the linear layers are trained for (``qat.py``), or None.
        trained_in: the width in which the linear layers of the decoder then are stored or computed, see ``whole.py``.
        stretch: how the window was made longer than the model's own, or None.
        tokenizer: the one that was loaded with the model, None where another library loaded it.
        task: what the model is for, a name of :data:`tunesmith.core.tasks.TASKS`.
        new_modules: modules that the files did not hold: random until they are trained.
        vocabulary: rows that the vocabulary was grown to, None where it is the model's own.
        rows: of the vocabulary when it was loaded, None where another library loaded it.
        is_merged: whether an adapter was merged into the weights, which no files hold then.
        fast: the vLLM that answers for it (``evaluation/fast.py``), None without ``fast_inference``.
        padding_side: of the tokenizer before ``for_inference``, which ``for_training`` gives back; None after that.
    """

    name: str
    dtype: DtypeChoice
    window: int
    notes: list[str] = field(default_factory=list)
    adapter: dict[str, Any] | None = None
    checkpointing: bool | str = False
    width: Width | None = None
    full_finetuning: bool = False
    qat: Any = None
    trained_in: Width | None = None
    stretch: Stretch | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    task: str = CAUSAL_LM
    new_modules: tuple[str, ...] = ()
    vocabulary: int | None = None
    rows: int | None = None
    is_merged: bool = False
    fast: Any = None
    padding_side: str | None = None


def facts_of(model: Any) -> ModelFacts:
    """Return the facts of a model, also of one that another library loaded."""
    known = getattr(model, "tunesmith_facts", None)
    if isinstance(known, ModelFacts):
        return known
    dtype = model.get_input_embeddings().weight.dtype
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    window = min(native_window(model.config) or DEFAULT_WINDOW, DEFAULT_WINDOW)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    task = task_of(type(base).__name__, model.config)
    choice = DtypeChoice(dtype, "as loaded by the caller")
    return ModelFacts(name, choice, window, width=width_of(model.config), task=task)


def load_model(
    source: ModelSource,
    *,
    max_seq_length: int | None = DEFAULT_WINDOW,
    dtype: str | torch.dtype | None = None,
    chat_template: str | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    width: Width | None = None,
    whole: bool = False,
    stretched: Stretch | None = None,
    with_processor: bool = False,
    head: Head | None = None,
    vocabulary: int | None = None,
    offload_embedding: bool = False,
    **hub: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a "folder", "gguf" or "hub" source, and its tokenizer.

    The model carries its :class:`ModelFacts`. ``hub`` are the keywords of transformers that choose a repository
    (token, revision, cache_dir ...). ``width`` quantizes the linear layers of the decoder; None leaves all weights in
    ``dtype``, or as the files have them where they are quantized already, which ``whole`` refuses. ``stretched`` makes
    the window longer, ``vocabulary`` (a number of rows) embedding and head. ``offload_embedding`` leaves the embedding
    in host memory. ``head`` says what the model is for; None leaves it to the files. A vision-language model comes with
    its processor where ``with_processor`` asks for that.

    Raises:
        ModelError: files are missing or corrupt, the architecture does not serve the task, ``width`` needs a GPU,
            ``max_seq_length`` is above what its window can be stretched to, the files are quantized in another
            ``width``, ``vocabulary`` is smaller than model or tokenizer need, or an embedding to offload is tied.
        SettingsError: a seed for new weights of a causal language model, which has none.
        NotSupportedYetError: ``width`` or ``stretched`` for another task than causal language modelling, or a model of
            audio.
    """
    import transformers

    limit_kernel_caches()
    head = head or Head()
    device = choose_device()
    check_fp8(width)
    place = local_place(source)
    own = _config(source, hub)
    _refuse_audio(source, own)
    task = head.task_for(own)
    is_other = task.name != CAUSAL_LM
    # The head of another task trains whole.
    choice = choose_dtype(dtype_to_train(dtype) if is_other else dtype, device)
    sees = has_vision(own) and not is_other
    _refuse_for_task(task.name, own, head.seed, width or width_of(own), stretched)
    tokenizer = load_tokenizer(source, chat_template=chat_template, with_processor=with_processor and sees, **hub)
    arguments: dict[str, Any] = {"dtype": choice.dtype, **_NO_CODE, **hub}
    config, how = _stretched_config(source, hub, stretched, max_seq_length)
    _refuse_for_task(task.name, own, head.seed, None, how)
    arguments |= head.arguments(own)
    if not is_other and head.auto_model is None:
        refuse_encoder(source, own)
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    packs = None if is_float8(width) else width  # in float8 they are stored afterwards
    if device_map is not None or packs is not None:
        # Weights are quantized one by one on the device where they go.
        arguments["device_map"] = device_map or {"": str(device)}
    if width is not None:
        _refuse_other_width(source, width, hub)
    beside = outside_decoder(own) if sees and width is not None else _READ_WHOLE.get(own.model_type)
    if packs is not None:
        arguments["quantization_config"] = quantization_config(packs, choice.dtype, leave_out=beside)
    _refuse_unrunnable(source, own, choice)
    if whole and width_of(own) is not None:
        raise ModelError(
            f"load_in_16bit=True, but the files of model {source.name} are quantized. Take the model in 16 bits, or "
            "leave load_in_16bit out."
        )
    if how is not None:
        arguments["config"] = config
    if offload_embedding:
        check_not_tied(config)
    kind = head.auto_model or (auto_class(own) if sees else getattr(transformers, task.auto))
    with readable_errors(source), seeded(head.seed), reading_once(packs):
        model, info = kind.from_pretrained(place, output_loading_info=True, **arguments)
    new = head.new_modules(model, own, set(info.get("missing_keys", ())))
    keep_softcap(model, attn_implementation)
    refuse_missing_weights(source, type(model).__name__, info, {key for keys in new.values() for key in keys})
    own_tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
    if vocabulary is not None:
        rows = model.get_input_embeddings().weight.shape[0]
        check_vocabulary(vocabulary, tokens=len(own_tokenizer), rows=rows)
        grow_vocabulary(model, vocabulary)
    if width is not None and packs is None:
        # The whole weights stay on the host: only those of one layer are on the device beside their codes.
        to_float8(model, width, leave_out=beside, device=device if device_map is None else None)
    if offload_embedding:
        _offload(model, device)
    if "device_map" not in arguments:
        model.to(device)
    if width is not None:
        _leave_files(model)
    protect_gradients(model)
    keep_activations(model)
    _fit_out(model, source, choice, max_seq_length, attn_implementation, width=width, task=task.name)
    facts = facts_of(model)
    facts.stretch, facts.vocabulary, facts.tokenizer = how, vocabulary, own_tokenizer
    facts.rows = None if task.name != CAUSAL_LM else model.get_input_embeddings().weight.shape[0]
    facts.new_modules = tuple(sorted(new)) if task.heads else ()
    if how is not None and stretched is None:
        _log.warning("the window is stretched to %s positions: rope_scaling=%s", how.window, how.scaling)
    if is_other and tokenizer.pad_token_id is not None:
        give_padding(model, tokenizer)
    return model, tokenizer


def empty_causal_lm(
    source: ModelSource,
    *,
    max_seq_length: int | None = DEFAULT_WINDOW,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    width: Width | None = None,
    stretched: Stretch | None = None,
    vocabulary: int | None = None,
    offload_embedding: bool = False,
    **hub: Any,
) -> PreTrainedModel:
    """Return what :func:`load_model` would, with shapes and no values: on the meta device, from config.json alone.

    Raises:
        ModelError: as :func:`load_model`, as far as the config shows it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_fp8(width)
    choice = choose_dtype(dtype, choose_device())
    arguments: dict[str, Any] = {"dtype": choice.dtype}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if hub.get("trust_remote_code"):
        arguments["trust_remote_code"] = True
    config, _ = _stretched_config(source, hub, stretched, max_seq_length)
    if vocabulary is not None:
        text = config.get_text_config()
        check_vocabulary(vocabulary, tokens=0, rows=text.vocab_size)
        text.vocab_size = vocabulary
    if offload_embedding:
        check_not_tied(config)
    if has_vision(config):
        raise NotSupportedYetError(f"{source.name} is a vision-language model: its memory cannot be predicted yet.")
    with readable_errors(source), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **arguments)
        if width is not None:
            make_quantized(model, width, choice.dtype, leave_out=_READ_WHOLE.get(config.model_type))
    if offload_embedding and choose_device().type != "cpu":
        keep_on_host(model, torch.device("meta"))
    _fit_out(model, source, choice, max_seq_length, attn_implementation, width=width)
    return model


def stored_bytes(source: ModelSource) -> dict[str, int]:
    """Return the bytes of the weights of a local model by the dtype they are stored in, from the headers of its files.

    Names are those of safetensors ("F32", "BF16", "I8" ...). Empty where no file is here: a hub model that was never
    downloaded, or weights of another format.
    """
    folder = Path(local_place(source))
    found: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        for entry in _header(file).values():
            start, end = entry["data_offsets"]
            found[entry["dtype"]] = found.get(entry["dtype"], 0) + end - start
    return found


def _header(file: Path) -> dict[str, Any]:
    """Return name -> dtype, shape and place of every tensor of a safetensors file."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if not 0 < size <= file.stat().st_size - 8:
                raise ValueError("its header is cut short")
            entries: dict[str, Any] = json.loads(opened.read(size))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is corrupt or cut short ({error}). Copy or download it again.") from error
    entries.pop("__metadata__", None)
    return entries


def _fit_out(
    model: PreTrainedModel,
    source: ModelSource,
    choice: DtypeChoice,
    window: int | None,
    attention: str | None,
    *,
    width: Width | None = None,
    task: str = CAUSAL_LM,
) -> None:
    """Give a model our attention and fused layers where it takes them, and the facts about it."""
    from tunesmith.engine.attention import use_document_attention
    from tunesmith.engine.install import install

    width = width or width_of(model.config)
    facts = ModelFacts(source.name, choice, _window(model.config, window), width=width, task=task)
    model.tunesmith_facts = facts  # type: ignore[assignment]
    if task != CAUSAL_LM:
        facts.notes.append("batches are padded and layers are transformers' own: fused ones are for CAUSAL_LM")
        return
    if has_vision(model.config):
        facts.notes += [NOT_FUSED, *float8_notes(model, width, is_fused=False)]
        return
    if attention is None:
        reason = use_document_attention(model)
        if reason is not None:
            facts.notes.append(f"attention per document is off: {reason}")
    plan = install(model).plan
    facts.notes += [*plan.reasons, *float8_notes(model, width, is_fused=bool(plan.known))]


def load_tokenizer(
    source: ModelSource, *, chat_template: str | None = None, with_processor: bool = False, **hub: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model or adapter and give it ``chat_template`` where one is asked for.

    ``with_processor``: load the processor of a vision-language model in its place.
    """
    from transformers import AutoTokenizer

    from tunesmith.data.templates import apply_template
    from tunesmith.models.processor import load_processor

    with readable_errors(source):
        load = load_processor if with_processor else AutoTokenizer.from_pretrained
        tokenizer = load(local_place(source), **{**_NO_CODE, **hub})
    if chat_template is not None:
        apply_template(tokenizer, chat_template)
    return tokenizer


def source_sees(source: ModelSource, **hub: Any) -> bool:
    """Say from its config alone whether a model is one from images and text to text."""
    return has_vision(_config(source, hub))


def load_window(
    source: ModelSource, asked: int | None = DEFAULT_WINDOW, *, stretched: Stretch | None = None, **hub: Any
) -> int:
    """Return the window that :func:`load_model` would use the model with, from its config alone.

    Raises:
        ModelError: config.json is missing or corrupt, ``asked`` is above what the window can be stretched to, or the
            model writes no text.
    """
    config = _stretched_config(source, hub, stretched, asked)[0]
    refuse_encoder(source, config)
    return _window(config, asked)


def _config(source: ModelSource, hub: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    with readable_errors(source):
        return AutoConfig.from_pretrained(local_place(source), **{**_NO_CODE, **hub})


def _stretched_config(
    source: ModelSource, hub: dict[str, Any], stretched: Stretch | None, asked: int | None
) -> tuple[Any, Stretch | None]:
    """Return the config with its window stretched as is said, or as far as is asked for, and how it was."""
    config = _config(source, hub)
    how = stretched or automatic(config, None if isinstance(asked, _DefaultWindow) else asked)
    if how is not None:
        stretch(config, how)
    return config, how


def _window(config: Any, asked: int | None) -> int:
    native = native_window(config)
    if asked is None:
        return native or DEFAULT_WINDOW
    return int(asked) if native is None else min(native, int(asked))  # above it only where nobody asked for it


def _offload(model: PreTrainedModel, device: torch.device) -> None:
    if device.type == "cpu":
        _log.warning("offload_embedding: this model computes on the CPU, so its embedding is in host memory already")
        return
    # Where weights were quantized on the device, the others have been put there too.
    model.get_input_embeddings().to("cpu")
    keep_on_host(model, device)


def _leave_files(model: PreTrainedModel) -> None:
    """Copy what was not quantized out of the weight files: one view keeps the pages of a whole file in memory."""
    trim_heap()  # of the whole weights that were quantized one by one
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            file = (parameter.data_ptr(), parameter.nbytes)
            parameter.data = parameter.data.clone()
            forget_pages([file])


def _refuse_other_width(source: ModelSource, width: Width, hub: dict[str, Any]) -> None:
    config = _config(source, hub)
    stored = getattr(config, "quantization_config", None)
    if stored is not None and width_of(config) != width:
        raise ModelError(
            f"model {source.name} is stored quantized already, and not as {asked_by(width)} would. Leave "
            f"{asked_by(width)} out, or take the model in 16 bits."
        )


def _refuse_unrunnable(source: ModelSource, config: Any, choice: DtypeChoice) -> None:
    """Refuse files that torchao has quantized in a way that this machine cannot run."""
    stored = getattr(config, "quantization_config", None)
    if stored is None or stored.get("quant_method") != "torchao":
        return
    from transformers import TorchAoConfig

    from tunesmith.models.qat import conversion_fails, scheme_of

    scheme = scheme_of(TorchAoConfig.from_dict(dict(stored)).quant_type)
    reason = conversion_fails(scheme, [config.get_text_config().hidden_size], choice.dtype)
    if reason is not None:
        raise ModelError(f"model {source.name} was quantized by torchao: {reason}.")


def local_place(source: ModelSource) -> str:
    """Return what transformers is told: a folder, the folder that a .gguf file was converted to, or a hub id."""
    return str(converted_gguf(Path(source.path))) if source.kind == "gguf" else source.path


def _refuse_audio(source: ModelSource, config: Any) -> None:
    from transformers import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING

    if type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING and not has_vision(config):
        raise NotSupportedYetError(
            f"{source.name} is a model of audio ({config.model_type}), and rows here hold text and images: train it "
            "with transformers (AutoModelForSpeechSeq2Seq and its processor) and PEFT."
        )


def _refuse_for_task(task: str, config: Any, seed: int, width: Width | None, stretched: Stretch | None) -> None:
    """Refuse what has no effect on models for ``task``, or is not written for them."""
    if task != CAUSAL_LM:
        name = asked_by(width) if width is not None else None if stretched is None else "rope_scaling"
        if name is not None:
            raise NotSupportedYetError(f"{name} with task_type={task!r} is not supported yet. Leave it out.")
        return
    if seed != Head().seed:
        raise SettingsError(
            f"random_state={seed} would seed new heads, and a causal language model gets none (new rows of "
            "resize_model_vocab are the mean of the old). Give it to get_peft_model, where it seeds the adapter."
        )
    if stretched is not None and has_vision(config):
        native = native_window(config)
        raise NotSupportedYetError(
            f"the window of a vision-language model is not stretched yet: use at most {native} positions."
        )
