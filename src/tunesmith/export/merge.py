"""Write a tuned model as a plain transformers folder: merged in float32, cast, shard by shard, verified.

Weights are made one at a time (``weights.py``) and written when a shard is full, so that beside the loaded model there
is never more than one shard. The folder appears whole, after ``verify.py`` has loaded it in a process of its own and
compared it with the live model; where that fails, it is kept under another name and an error says what differed.

A quantized base has two routes: what its weights stand for, and the 16-bit weights that they were rounded from, where
those are at hand. Merging into the quantized weights is none: it undoes most of the training. Both are written and
measured, and the one that is nearer to the live model is kept.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tunesmith.core.errors import AdapterError, ModelError
from tunesmith.core.files import require_new, require_space, whole_folder
from tunesmith.export.card import About
from tunesmith.export.form import MERGE_METHODS, Form, form_of
from tunesmith.export.report import ExportReport, write_report
from tunesmith.export.verify import Comparison, compare, reference_of
from tunesmith.export.weights import MergedWeight, adapter_shares, merged_weights, mixed
from tunesmith.models.aliases import find_model
from tunesmith.models.load import facts_of, local_place
from tunesmith.models.prompts import set_ends

__all__ = ["SHARD_BYTES", "merge_model"]

SHARD_BYTES = 5 * 10**9
_NOTHING = About()
_LAYER = re.compile(r".*?\.\d+\.")


def merge_model(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    *,
    method: str = "merged_16bit",
    adapters: Mapping[str, float] | None = None,
    prompts: Sequence[Any] = (),
    shard_bytes: int = SHARD_BYTES,
    about: About = _NOTHING,
) -> ExportReport:
    """Write ``model`` with its adapters merged to ``folder``, as transformers loads it, and compare it with the model.

    Args:
        model: a PEFT model, or one whose weights were trained; it is not changed.
        tokenizer: saved beside; None saves none, and compares on tokens drawn at random.
        method: "merged_16bit" (float16 where the base is, else bfloat16), "merged_32bit", or "merged_4bit": merged in
            float32 and rounded once, the linear layers of the decoder to NF4, all else to 16 bits.
        adapters: name -> share of each adapter that is merged; None: the active ones in full.
        prompts: texts or token ids to compare on, beside fixed texts: a few of the training rows.
        shard_bytes: largest file of weights.
        about: what the model card says beside the figures.
    Raises:
        AdapterError: something that no plain weight can hold.
        OutputError: the folder is there already, cannot be written, or the disk has no room.
        ExportError: the export differs from the live model; it is kept as ``<folder>-failed``.
    """
    require_new(folder)
    trained_in = facts_of(model).trained_in
    if trained_in is not None:
        raise AdapterError(
            f"all weights of this model were trained in {trained_in.removesuffix('bit')} bits, so there is nothing to "
            "merge. Save it with save_pretrained, which writes what was trained."
        )
    start = time.perf_counter()
    set_ends(model, tokenizer)
    shares, form = adapter_shares(model, adapters), form_of(model, method)
    needed = sum(form.bytes_of(weight) for weight in merged_weights(model, shares))
    routes = _routes(model, shares)
    if form.quantization is not None and facts_of(model).width == "4bit":
        _refuse_second_rounding(routes)
    require_space(folder, needed * min(2, len(routes)), "the merged model")
    with mixed(model, shares):
        reference = reference_of(model, tokenizer, prompts)
    with whole_folder(folder) as temporary:
        comparisons: dict[str, Comparison] = {}
        for route, originals in routes.items():
            place = temporary / f".{route}"
            place.mkdir()
            _write(model, place, merged_weights(model, shares, originals), form, shard_bytes)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
            # Asked for another dtype than its files have, transformers would load some weights in NF4 folders in that
            # one and leave the others.
            own = None if form.quantization is None else "auto"
            comparisons[route] = compare(reference, place, dtype=own)
        best = min(comparisons, key=lambda route: comparisons[route].kl)
        _keep(temporary, best)
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        report = ExportReport(folder, method, best, size, str(form), time.perf_counter() - start, comparisons,
                              reference.moved)  # fmt: skip
        bar = MERGE_METHODS[method] + reference.rounding
        write_report(report, temporary, bar, base=facts_of(model).name, about=about)
    return report


def _routes(model: Any, shares: Mapping[str, float]) -> dict[str, Mapping[str, Callable[[], torch.Tensor]] | None]:
    """Return the ways to the weights of the base, by name."""
    facts = facts_of(model)
    if facts.width is None:
        return {"base": None}
    originals = _originals(facts.name)
    # Others come from memory: trained whole or with more rows they need not be in the files at all.
    wanted = {weight.name: weight.shape for weight in merged_weights(model, shares) if weight.is_quantized}
    fits = all(name in originals and originals[name][0] == shape for name, shape in wanted.items())
    if not originals or not fits:
        return {"dequantized": None}
    return {"dequantized": None, "original": {name: make for name, (_, make) in originals.items()}}


def _refuse_second_rounding(routes: dict[str, Any]) -> None:
    """Leave only the weights that were never rounded.

    Those that were lie on NF4's own values, and a small change to them is rounded away: on SmolLM2 1 % of what the
    training had gained was left.
    """
    del routes["dequantized"]
    if not routes:
        raise AdapterError(
            "save_method='merged_4bit' would undo the training: the base is in 4 bits already, and its 16-bit weights "
            "are not on this disk. Use 'lora', to be loaded with load_in_4bit, or 'merged_16bit'."
        )


def _originals(name: str) -> dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Return name -> (shape, reader) of the whole weights that model ``name`` has on this disk; none where it has none.

    The head of a tied model has the name that the file gives it, or none.
    """
    try:
        place = Path(local_place(find_model(name)))
    except ModelError:
        return {}
    found: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {}
    for file in sorted(place.glob("*.safetensors")) if place.is_dir() else []:
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (no mapping)
                entry = opened.get_slice(key)
                if entry.get_dtype() not in ("F32", "BF16", "F16"):
                    return {}
                found[key] = (tuple(entry.get_shape()), _reader(file, key))
    return found


def _reader(file: Path, key: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with safe_open(str(file), framework="pt") as opened:
            return opened.get_tensor(key)

    return read


def _write(model: Any, folder: Path, weights: Iterator[MergedWeight], form: Form, shard_bytes: int) -> None:
    """Write the weights in shards, with their index and the configs."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    shards, shard, size = [], {}, 0
    for name, tensor in _in_original_format(base, weights, form):
        if shard and size + tensor.nbytes > shard_bytes:
            shards.append(_write_shard(folder, len(shards), shard))
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    _name_shards(folder, shards)
    names = {name for shard in shards for name in shard}
    config = copy.deepcopy(base.config)
    config.dtype = form.dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if form.quantization is not None:
        config.quantization_config = form.quantization
    head = [name for name in (getattr(base, "_tied_weights_keys", None) or {}) if name in names]
    if head:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if base.can_generate() and base.generation_config is not None:
        base.generation_config.save_pretrained(folder)


def _in_original_format(base: Any, weights: Iterator[MergedWeight], form: Form) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors under the names that published files have: some models keep experts together in memory.

    Layer by layer, since a conversion never reaches over two of them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    group: dict[str, torch.Tensor] = {}
    place = ""
    for weight in weights:
        match = _LAYER.match(weight.name)
        here = match[0] if match else ""
        if group and here != place:
            yield from revert_weight_conversion(base, group).items()
            group = {}
        place = here
        group |= form.stored(weight)
    yield from revert_weight_conversion(base, group).items()


def _write_shard(folder: Path, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    save_file(tensors, folder / f"shard-{index}.safetensors", metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the shards the names that transformers looks for."""
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}.safetensors").rename(folder / name)
        places |= dict.fromkeys(shard, name)
    total = sum(size for shard in shards for size in shard.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _keep(folder: Path, route: str) -> None:
    """Move what one route wrote up into ``folder`` and remove the others."""
    for file in (folder / f".{route}").iterdir():
        file.rename(folder / file.name)
    for place in folder.glob(".*"):
        shutil.rmtree(place)
