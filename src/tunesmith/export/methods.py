"""The export methods that Unsloth's users call on a model, and one door for all methods of export."""

from __future__ import annotations

import inspect
import math
import re
import tempfile
import types
from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tunesmith.core.arguments import Idle, refuse_others
from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.core.files import require_new
from tunesmith.core.names import did_you_mean
from tunesmith.core.tasks import CAUSAL_LM
from tunesmith.export.adapter import export_adapter
from tunesmith.export.card import About
from tunesmith.export.form import MERGE_METHODS
from tunesmith.export.gguf.methods import is_gguf_method
from tunesmith.export.hub import Push, checked, upload
from tunesmith.export.merge import merge_model
from tunesmith.export.report import ExportReport
from tunesmith.export.torchao import TORCHAO_METHODS, export_torchao
from tunesmith.models.load import facts_of

if TYPE_CHECKING:
    from tunesmith.export.gguf.save import GgufReport

__all__ = ["GGUF_LORA", "METHODS", "bytes_of", "check_method", "export_model", "export_or_push", "with_exports"]

METHODS = (*MERGE_METHODS, "lora", *TORCHAO_METHODS)
"""How a model can be exported."""

GGUF_LORA = "gguf_lora"
"""The adapter alone as a GGUF file."""

# Unsloth's other names.
_ALIASES = {"merged_4bit_forced": "merged_4bit", "torchao_int8": "torchao-int8"}

_SAFETENSORS = "weights are only written as safetensors"
_CALIBRATION = "no method here calibrates"
# Arguments of Unsloth's that nothing here could follow.
_OTHERS: Idle = {
    "state_dict": ((None,), "the weights are those of the model"),
    "save_function": ((None,), _SAFETENSORS),
    "safe_serialization": ((None, True), _SAFETENSORS),
    "variant": ((None,), "programs look for weights under their plain names"),
    "save_peft_format": ((None, True), "adapters are only written as PEFT has them"),
    # A share of the memory that may be used, and a shard is less.
    "maximum_memory_usage": (
        lambda share: share is None or (type(share) in (int, float) and 0 < share <= 0.95),
        "a share from 0 to 0.95 is taken, and one shard is held at a time: give max_shard_size",
    ),
    "use_temp_dir": ((None, True), "what is uploaded is exported to a temporary folder"),
    "calibration_dataset": ((None,), _CALIBRATION),
    "num_calibration_samples": ((None,), _CALIBRATION),
    "max_seq_length": ((None,), _CALIBRATION),
}

_NOT_FOR_GGUF: Idle = {
    "max_shard_size": ((None, "5GB"), "a GGUF is one file"),
    "tags": ((None,), "GGUF files are written without a model card"),
    "datasets": ((None,), "GGUF files are written without a model card"),
    "merge_is_disposable": ((None, True), "no merged model is kept beside the GGUF files"),
}


def check_method(method: str | None) -> str:
    """Return the method in our own letters; None is "merged_16bit".

    Raises:
        SettingsError: there is none of that name, or it is one of GGUF.
    """
    if method is None:
        return "merged_16bit"
    if not isinstance(method, str):
        raise SettingsError(f"save_method={method!r}: one name is needed. Use {', '.join(METHODS)}.")
    name = _ALIASES.get(method.lower(), method.lower())
    if name not in METHODS:
        is_gguf = is_gguf_method(method) or name == "gguf"
        other = " save_pretrained_gguf writes that." if is_gguf else did_you_mean(method, METHODS)
        raise SettingsError(f"save_method={method!r}: use {', '.join(METHODS)}.{other}")
    return name


def export_model(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    *,
    method: str | Sequence[str],
    adapters: Mapping[str, float] | None = None,
    max_shard_size: int | str | None = None,
    **how: Any,
) -> Any:
    """Export ``model`` by a method of :data:`METHODS` or methods of GGUF; ``how`` as in the function for it.

    Returns its report: :class:`ExportReport`, or :class:`tunesmith.export.gguf.save.GgufReport`.

    Raises:
        SettingsError: no such method, or ``adapters`` or ``max_shard_size`` for one that merges nothing or writes one
            file.
        ModelError: it is no language model, or its adapters are switched off.
    """
    _refuse_other_tasks(model)
    _check_given(model, tokenizer, adapters, how.get("prompts", ()))
    if not isinstance(method, str) or method == GGUF_LORA:
        return _export_gguf(model, folder, tokenizer, method, adapters, max_shard_size, **how)
    name = check_method(method)
    if name in MERGE_METHODS:
        if max_shard_size is not None:
            how["shard_bytes"] = bytes_of(max_shard_size)
        return merge_model(model, folder, tokenizer, method=name, adapters=adapters, **how)
    if adapters is not None or max_shard_size is not None:
        given = "adapters" if adapters is not None else "max_shard_size"
        raise SettingsError(f"{given} is for {', '.join(MERGE_METHODS)}, not for save_method={name!r}. Leave it out.")
    if name == "lora":
        return export_adapter(model, folder, tokenizer, **how)
    return export_torchao(model, folder, tokenizer, TORCHAO_METHODS[name], **how)


def _refuse_other_tasks(model: Any) -> None:
    """Refuse a model that does not write text, by which an export is compared with it."""
    task = facts_of(model).task
    if task != CAUSAL_LM:
        merged = "model.merge_and_unload()" if hasattr(model, "peft_config") else "model"
        raise ModelError(
            f"{facts_of(model).name} is a model for {task}, and exports compare the text that language models write. "
            f"Save it with {merged}.save_pretrained(folder), and its tokenizer with tokenizer.save_pretrained(folder)."
        )


def _check_given(model: Any, tokenizer: Any, adapters: Any, prompts: Any) -> None:
    """Refuse what an export could only fail at once it has begun."""
    if isinstance(tokenizer, str):
        raise SettingsError(f"tokenizer={tokenizer!r} is a text: the tokenizer comes second, the method third.")
    if isinstance(prompts, str) or not all(isinstance(prompt, Sized) and len(prompt) for prompt in prompts):
        raise SettingsError(f"prompts={prompts!r}: a list of texts is needed, and none of them empty.")
    if adapters is not None and not (
        isinstance(adapters, Mapping)
        and adapters
        and all(isinstance(share, (int, float)) and math.isfinite(share) for share in adapters.values())
    ):
        raise SettingsError(f"adapters={adapters!r}: give the share of each, like {{'default': 1.0}}.")
    if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
        raise ModelError(
            "the adapters of this model are switched off, so that it answers as its base. Export it outside of "
            "disable_adapter(), or switch them on: model.base_model.enable_adapter_layers()."
        )


def _export_gguf(
    model: Any,
    folder: Path,
    tokenizer: Any,
    methods: str | Sequence[str],
    adapters: Mapping[str, float] | None,
    shard: int | str | None,
    *,
    stored_as: str | None = None,
    **how: Any,
) -> GgufReport:
    """Write GGUF files of ``methods``, or the adapter alone, which is ``stored_as`` "f32", "f16" or "bf16"."""
    from tunesmith.export.gguf.save import save_gguf
    from tunesmith.export.gguf.save_lora import save_lora_gguf

    if shard is not None:
        raise SettingsError("max_shard_size is for merged models, and a GGUF is one file. Leave it out.")
    if methods != GGUF_LORA:
        return save_gguf(model, folder, tokenizer, methods=methods, adapters=adapters, **how)
    if adapters is not None:
        raise SettingsError(f"adapters is for what merges them, not for {GGUF_LORA}. Leave it out.")
    return save_lora_gguf(model, folder, tokenizer, method=stored_as, **how)


def bytes_of(size: int | str) -> int:
    """Return the bytes of a ``max_shard_size`` like 5000000000 or "5GB".

    Raises:
        SettingsError: it is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    count = 0
    if found is not None:
        count = int(float(found[1]) * (1024 if found[3] else 1000) ** ("", *"KMGT").index(found[2].upper()))
    if count < 1:
        raise SettingsError(f"max_shard_size={size!r} is no size. Give bytes, or a text like '5GB' or '500MB'.")
    return count


def with_exports(model: Any) -> Any:
    """Return ``model`` with the functions below that save and push as methods.

    On this instance alone: the classes of transformers and PEFT stay as they are.
    """
    model.save_pretrained_merged = types.MethodType(save_merged, model)
    model.push_to_hub_merged = types.MethodType(push_merged, model)
    model.save_pretrained_gguf = types.MethodType(save_gguf_files, model)
    model.push_to_hub_gguf = types.MethodType(push_gguf, model)
    model.save_pretrained_torchao = types.MethodType(save_quantized, model)
    return model


def save_merged(
    model: Any,
    save_directory: Any,
    tokenizer: Any = None,
    save_method: str | None = "merged_16bit",
    *,
    adapters: Mapping[str, float] | None = None,
    prompts: Sequence[str] = (),
    max_shard_size: int | str | None = None,
    tags: Sequence[str] | str | None = None,
    datasets: Sequence[str] | str | None = None,
    run: Any = None,
    is_main_process: bool = True,
    temporary_location: str | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    **others: Any,
) -> ExportReport | None:
    """Write a folder that transformers (or, with "lora", PEFT) loads, and compare it with this model.

    Args:
        save_method: of :data:`METHODS`, in any case of letters: "merged_16bit", "merged_32bit", "merged_4bit" (NF4),
            "lora" (the adapter alone), "torchao-int8" and others.
        adapters: name -> share of each adapter that is merged; None: the active ones in full.
        prompts: texts to compare on, beside fixed ones.
        max_shard_size: largest file of weights, in bytes or like "5GB", which None stands for.
        tags, datasets: for the model card.
        run: folder of the run that trained the model, whose figures the card names.
        is_main_process: False writes nothing and returns None.
        push_to_hub: upload the folder too, to ``repo_id`` or, without one, a repository named like ``save_directory``.
        token, private, commit_message, commit_description, create_pr, revision: see
            :class:`tunesmith.export.hub.Push`.
        others: arguments of Unsloth's that nothing here follows, with the values that ask for nothing.
    Raises:
        HubError: before anything is written, where the upload could not be done.
        SettingsError: an argument that would have no effect.
        Others: see :func:`tunesmith.export.merge.merge_model` and :func:`tunesmith.export.adapter.export_adapter`.
    """
    _refuse("save_pretrained_merged", others)
    if temporary_location is not None:
        raise SettingsError("temporary_location: an export is written beside save_directory. Leave it out.")
    hub = {"repo_id": repo_id, "token": token or None, "private": private, "commit_message": commit_message,
           "commit_description": commit_description, "create_pr": create_pr or None, "revision": revision}  # fmt: skip
    given = [name for name, value in hub.items() if value is not None]
    if given and not push_to_hub:
        raise SettingsError(f"{given[0]} is for uploads: give push_to_hub=True too, or leave it out.")
    if not is_main_process:
        return None
    name = check_method(save_method)
    folder = Path(save_directory).expanduser()
    require_new(folder)
    push = checked(_push(repo_id or _repository(save_directory), hub)) if push_to_hub else None
    return export_or_push(model, folder, tokenizer, push=push, method=name, adapters=adapters, prompts=prompts,
                          max_shard_size=max_shard_size, about=_about(tags, datasets, run))  # fmt: skip


def push_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str | None = "merged_16bit",
    *,
    adapters: Mapping[str, float] | None = None,
    prompts: Sequence[str] = (),
    max_shard_size: int | str | None = None,
    tags: Sequence[str] | str | None = None,
    datasets: Sequence[str] | str | None = None,
    run: Any = None,
    is_main_process: bool = True,
    temporary_location: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    **others: Any,
) -> ExportReport | None:
    """Export to a temporary folder in ``temporary_location``, compare, upload to ``repo_id`` and remove the folder.

    Args and Raises: see :func:`save_merged`. The report's ``folder`` is gone, its ``url`` is there.
    """
    _refuse("push_to_hub_merged", others)
    if not is_main_process:
        return None
    name = check_method(save_method)
    push = checked(_push(repo_id, {"token": token or None, "private": private, "commit_message": commit_message,
                                   "commit_description": commit_description, "create_pr": create_pr,
                                   "revision": revision}))  # fmt: skip
    return export_or_push(model, None, tokenizer, push=push, place=temporary_location, method=name,
                          adapters=adapters, prompts=prompts, max_shard_size=max_shard_size,
                          about=_about(tags, datasets, run))  # fmt: skip


def export_or_push(
    model: Any, folder: Path | None, tokenizer: Any = None, *, push: Push | None, place: str | None = None, **how: Any
) -> Any:
    """Export as :func:`export_model` does and upload that where ``push``, which is checked, says so.

    Where ``folder`` is None, to one in ``place`` that only lasts until it is uploaded.
    """
    if folder is not None:
        report = export_model(model, folder, tokenizer, **how)
        return report if push is None else replace(report, url=upload(folder, push))
    if push is None:
        raise SettingsError("an export needs a folder, or a repository that it is uploaded to.")
    with tempfile.TemporaryDirectory(prefix="tunesmith-", dir=place) as temporary:
        return export_or_push(model, Path(temporary) / push.repo_id.rpartition("/")[2], tokenizer, push=push, **how)


def save_quantized(
    model: Any,
    save_directory: Any,
    tokenizer: Any = None,
    torchao_config: Any = None,
    *,
    prompts: Sequence[str] = (),
    push_to_hub: bool = False,
    token: str | None = None,
) -> ExportReport:
    """Quantize with torchao, save, load in another process and compare; see :mod:`tunesmith.export.torchao`.

    Args:
        torchao_config: a name of ``models/qat.py`` or a config of torchao; None: what the model was trained for.
        prompts: texts to compare on, beside fixed ones.
        push_to_hub: upload the folder too, to a repository named like it, with ``token``.
    Raises: see :func:`tunesmith.export.torchao.export_torchao` and :func:`tunesmith.export.hub.checked`.
    """
    if token and not push_to_hub:
        raise SettingsError("token is for uploads: give push_to_hub=True too, or leave it out.")
    _refuse_other_tasks(model)
    _check_given(model, tokenizer, None, prompts)
    push = checked(Push(_repository(save_directory), token=token or None)) if push_to_hub else None
    folder = Path(save_directory).expanduser()
    report = export_torchao(model, folder, tokenizer, torchao_config, prompts=prompts)
    return report if push is None else replace(report, url=upload(folder, push))


def save_gguf_files(
    model: Any,
    save_directory: Any,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] | None = "fast_quantized",
    first_conversion: str | None = None,
    push_to_hub: bool = False,
    *,
    save_method: str | None = None,
    imatrix_file: Any = None,
    adapters: Mapping[str, float] | None = None,
    prompts: Sequence[str] = (),
    is_main_process: bool = True,
    token: str | None = None,
    private: bool | None = None,
    **others: Any,
) -> GgufReport | None:
    """Write GGUF files and a Modelfile, and compare them with this model; llama.cpp is run where it is installed.

    Args:
        quantization_method: one name or several of ``gguf/methods.py``, in any case of letters.
        first_conversion: what llama.cpp makes K- and I-quants of: "f32", "bf16" or "f16".
        push_to_hub: upload the folder too, to a repository named like it, with ``token``, ``private`` where it is new.
        save_method: None for the model with its adapters merged; "lora" for the adapter alone, in f32, f16 or bf16.
        imatrix_file: importance matrix of ``llama-imatrix``, for K- and I-quants.
        adapters: name -> share of each adapter that is merged; None: the active ones in full.
        prompts: texts to compare on, beside fixed ones.
        is_main_process: False writes nothing and returns None.
        others: arguments of Unsloth's that nothing here follows, with the values that ask for nothing.
    Raises: see :func:`tunesmith.export.gguf.save.save_gguf`, ``gguf/save_lora.py`` and
        :func:`tunesmith.export.hub.checked`.
    """
    _refuse("save_pretrained_gguf", others, _NOT_FOR_GGUF)
    if (token or private is not None) and not push_to_hub:
        raise SettingsError("token and private are for uploads: give push_to_hub=True too, or leave them out.")
    if not is_main_process:
        return None
    push = None
    if push_to_hub:
        push = checked(Push(_repository(save_directory), token=token or None, private=private))
    how = _gguf_method(quantization_method, first_conversion, save_method, imatrix_file, adapters)
    return export_or_push(model, Path(save_directory).expanduser(), tokenizer, push=push, prompts=prompts, **how)


def push_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] | None = "fast_quantized",
    first_conversion: str | None = None,
    *,
    save_method: str | None = None,
    imatrix_file: Any = None,
    adapters: Mapping[str, float] | None = None,
    prompts: Sequence[str] = (),
    is_main_process: bool = True,
    temporary_location: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    **others: Any,
) -> GgufReport | None:
    """Write GGUF files to a temporary folder in ``temporary_location``, compare, upload to ``repo_id`` and remove it.

    Args and Raises: see :func:`save_gguf_files` and :class:`tunesmith.export.hub.Push`.
    """
    _refuse("push_to_hub_gguf", others, _NOT_FOR_GGUF)
    if not is_main_process:
        return None
    push = checked(_push(repo_id, {"token": token or None, "private": private, "commit_message": commit_message,
                                   "commit_description": commit_description, "create_pr": create_pr,
                                   "revision": revision}))  # fmt: skip
    how = _gguf_method(quantization_method, first_conversion, save_method, imatrix_file, adapters)
    return export_or_push(model, None, tokenizer, push=push, place=temporary_location, prompts=prompts, **how)


def _gguf_method(
    asked: str | Sequence[str] | None,
    first: str | None,
    save_method: str | None,
    imatrix_file: Any,
    adapters: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Return what :func:`export_model` is told for the arguments of ``save_pretrained_gguf``.

    Raises:
        SettingsError: another ``save_method``, or arguments that mean nothing to an adapter alone.
    """
    asked = "fast_quantized" if asked is None else asked
    if save_method is None:
        imatrix = None if imatrix_file is None else Path(imatrix_file).expanduser()
        methods = asked if isinstance(asked, (list, tuple)) else [asked]
        return {"method": methods, "first": first, "imatrix": imatrix, "adapters": adapters}
    if not isinstance(save_method, str) or save_method.lower() != "lora":
        raise SettingsError(f"save_method={save_method!r}: leave it out, or use 'lora' for the adapter alone.")
    for name, value in (("first_conversion", first), ("imatrix_file", imatrix_file), ("adapters", adapters)):
        if value is not None:
            raise SettingsError(f"{name} has no meaning for save_method='lora'. Leave it out.")
    if not isinstance(asked, str):
        raise SettingsError("save_method='lora' writes one file: quantization_method is 'f32', 'f16' or 'bf16'.")
    return {"method": GGUF_LORA, "stored_as": None if asked == "fast_quantized" else asked}


def _refuse(method: str, others: Mapping[str, Any], besides: Idle = MappingProxyType({})) -> None:
    """Refuse what is not known, and what is known (``_OTHERS`` and ``besides``) and asks for what is not done."""
    known = inspect.signature(push_gguf if besides else save_merged).parameters
    refuse_others(method, others, {**_OTHERS, **besides}, known)


def _push(repo_id: str, hub: Mapping[str, Any]) -> Push:
    return Push(repo_id, **{name: value for name, value in hub.items() if name != "repo_id" and value is not None})


def _repository(save_directory: Any) -> str:
    """Return the repository that a folder is named like: "owner/name" as it is, of other paths the last part."""
    text = str(save_directory)
    return text if re.fullmatch(r"[\w][\w.-]*/[\w.-]+", text) else Path(text).name


def _about(tags: Sequence[str] | str | None, datasets: Sequence[str] | str | None, run: Any) -> About:
    head, rows = ((given,) if isinstance(given, str) else tuple(given or ()) for given in (tags, datasets))
    return About(head, rows, None if run is None else Path(run).expanduser())
