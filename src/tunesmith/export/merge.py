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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tunesmith.core.errors import AdapterError, ExportError, ModelError, OutputError
from tunesmith.core.files import require_space, whole_folder
from tunesmith.export.verify import Comparison, compare, reference_of
from tunesmith.export.weights import MergedWeight, adapter_shares, merged_weights
from tunesmith.models.aliases import find_model
from tunesmith.models.load import facts_of, local_place

__all__ = ["MERGE_METHODS", "ExportReport", "merge_model", "refuse_difference"]

MERGE_METHODS = {"merged_16bit": 1e-3, "merged_32bit": 1e-6}
"""Method -> the mean KL divergence (nats a token) between live model and export above which the export has failed."""

_SHARD_BYTES = 5 * 10**9
_LAYER = re.compile(r".*?\.\d+\.")


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written and how near to the live model it is.

    Attributes:
        folder: where it lies.
        method: of :data:`MERGE_METHODS`.
        route: how the weights of the base were had: "base", "dequantized" or "original".
        size: bytes of its weights.
        dtype: of its weights.
        seconds: for writing and comparing.
        comparisons: route -> how it compares with the live model.
    """

    folder: Path
    method: str
    route: str
    size: int
    dtype: str
    seconds: float
    comparisons: dict[str, Comparison]

    @property
    def comparison(self) -> Comparison:
        """How what was kept compares with the live model."""
        return self.comparisons[self.route]

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        routes = {route: found.record() for route, found in self.comparisons.items()}
        return {"method": self.method, "route": self.route, "bytes": self.size, "dtype": self.dtype,
                "seconds": self.seconds, "comparisons": routes}  # fmt: skip


def merge_model(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    *,
    method: str = "merged_16bit",
    adapters: Mapping[str, float] | None = None,
    prompts: Sequence[Any] = (),
    shard_bytes: int = _SHARD_BYTES,
) -> ExportReport:
    """Write ``model`` with its adapters merged to ``folder``, as transformers loads it, and compare it with the model.

    Args:
        model: a PEFT model, or one whose weights were trained; it is not changed.
        tokenizer: saved beside; None saves none, and compares on tokens drawn at random.
        method: "merged_16bit" (float16 where the base is, else bfloat16) or "merged_32bit".
        adapters: name -> share of each adapter that is merged; None: the active ones in full.
        prompts: texts or token ids to compare on, beside fixed texts: a few of the training rows.
        shard_bytes: largest file of weights.
    Raises:
        AdapterError: something that no plain weight can hold.
        OutputError: the folder is there already, cannot be written, or the disk has no room.
        ExportError: the export differs from the live model; it is kept as ``<folder>-failed``.
    """
    if folder.exists():
        raise OutputError(f"{folder} is there already. Choose another folder, or remove it first.")
    trained_in = facts_of(model).trained_in
    if trained_in is not None:
        raise AdapterError(
            f"all weights of this model were trained in {trained_in.removesuffix('bit')} bits, so there is nothing to "
            "merge. Save it with save_pretrained, which writes what was trained."
        )
    start = time.perf_counter()
    shares = adapter_shares(model, adapters)
    dtype = _dtype(model, method)
    size = sum(_bytes_of(weight, dtype) for weight in merged_weights(model, shares))
    routes = _routes(model, shares)
    require_space(folder, size * min(2, len(routes)), "the merged model")
    reference = reference_of(model, tokenizer, prompts)
    with whole_folder(folder) as temporary:
        comparisons: dict[str, Comparison] = {}
        for route, originals in routes.items():
            place = temporary / f".{route}"
            place.mkdir()
            _write(model, place, merged_weights(model, shares, originals), dtype, shard_bytes)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
            comparisons[route] = compare(reference, place)
        best = min(comparisons, key=lambda route: comparisons[route].kl)
        report = ExportReport(folder, method, best, size, str(dtype).removeprefix("torch."),
                              time.perf_counter() - start, comparisons)  # fmt: skip
        _keep(temporary, best)
        (temporary / "export_report.json").write_text(json.dumps(report.record(), indent=1) + "\n", encoding="utf-8")
        refuse_difference(report, temporary, MERGE_METHODS[method])
    return report


def _dtype(model: Any, method: str) -> torch.dtype:
    if method == "merged_32bit":
        return torch.float32
    own = facts_of(model).dtype.dtype
    return own if own.itemsize == 2 else torch.bfloat16


def _bytes_of(weight: MergedWeight, dtype: torch.dtype) -> int:
    count = 1
    for length in weight.shape:
        count *= length
    return count * (dtype.itemsize if weight.is_float else 8)


def _routes(model: Any, shares: Mapping[str, float]) -> dict[str, Mapping[str, Callable[[], torch.Tensor]] | None]:
    """Return the ways to the weights of the base, by name."""
    facts = facts_of(model)
    if facts.width is None:
        return {"base": None}
    originals = _originals(facts.name)
    wanted = {weight.name: weight.shape for weight in merged_weights(model, shares)}
    fits = all(name in originals and originals[name][0] == shape for name, shape in wanted.items())
    if not originals or not fits:
        return {"dequantized": None}
    return {"dequantized": None, "original": {name: make for name, (_, make) in originals.items()}}


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


def _write(model: Any, folder: Path, weights: Iterator[MergedWeight], dtype: torch.dtype, shard_bytes: int) -> None:
    """Write the weights in shards, with their index and the configs."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    shards, shard, size = [], {}, 0
    for name, tensor in _in_original_format(base, weights, dtype):
        if shard and size + tensor.nbytes > shard_bytes:
            shards.append(_write_shard(folder, len(shards), shard))
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    _name_shards(folder, shards)
    names = {name for shard in shards for name in shard}
    config = copy.deepcopy(base.config)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    head = [name for name in (getattr(base, "_tied_weights_keys", None) or {}) if name in names]
    if head:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if base.can_generate() and base.generation_config is not None:
        base.generation_config.save_pretrained(folder)


def _in_original_format(
    base: Any, weights: Iterator[MergedWeight], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
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
        made = weight.make()
        # A copy: a view would keep the file of the base, or tie two entries of a shard.
        group[weight.name] = made.to("cpu", dtype if weight.is_float else made.dtype, copy=True).contiguous()
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


def refuse_difference(report: ExportReport, temporary: Path, bar: float) -> None:
    """Raise where the export is another model than the live one, and keep it under a name that says so."""
    found = report.comparison
    if found.kl <= bar:
        return
    failed = report.folder.with_name(f"{report.folder.name}-failed")
    shutil.rmtree(failed, ignore_errors=True)
    temporary.rename(failed)
    raise ExportError(
        f"the {report.method} export answers otherwise than the model: KL divergence {found.kl:.2g} on {found.tokens} "
        f"tokens (allowed {bar:g}), the same likeliest token in {found.top1:.1%} of them. It is kept as {failed}."
    )
