"""A PEFT model that saves what its adapter needs to answer as it was trained.

Beside a plain PEFT folder it writes ``base.json`` where the base was not as its files have it (4 or 8 bits, a longer
window, more rows, a head with labels, rounded for a scheme of quantization), so that
:func:`tunesmith.adapters.state.load_source` loads it in the same way. And it saves adapters that took something out of
the base for the base as it was: PiSSA, OLoRA, CorDA and LoRA-GA put directions of a weight into A and B and take them
out of the base, W_res = W - s B0 A0. What such an adapter adds to the base as it was is s (B A - B0 A0), a plain
adapter of twice the rank:

    A' = [A; A0]    B' = [B, -B0]    with the same scale s

What LoftQ does to the base is not of low rank: there the base itself is saved in the folder ``base/`` of the adapter,
which is found again wherever the adapter's folder is moved to. So is a base that another adapter was merged into.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper

from tunesmith.adapters import starts
from tunesmith.core.errors import AdapterError
from tunesmith.core.files import lasting_path, require_space, whole_folder
from tunesmith.core.tasks import TASKS
from tunesmith.engine.read import is_quantized
from tunesmith.models.heads import labels_of
from tunesmith.models.load import facts_of
from tunesmith.models.rope import Stretch
from tunesmith.models.settings import Width
from tunesmith.models.whole import WholeModel

if TYPE_CHECKING:
    import torch

__all__ = [
    "AdapterModel",
    "TrainedOn",
    "as_adapter_model",
    "base_beside",
    "base_bytes_beside",
    "raw_weights",
    "refuse_quantized",
    "trained_for",
    "trained_on",
]

_WEIGHTS, _CONFIG, _BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
_BESIDE = "base"
_log = logging.getLogger(__name__)


def refuse_quantized(model: Any) -> None:
    """Refuse to take anything out of a quantized base.

    Raises:
        AdapterError: what is left of a weight would be rounded again, and A and B hold nothing of that.
    """
    if any(is_quantized(module) for module in model.modules()):
        raise AdapterError(
            "this init_lora_weights changes the base, and a quantized base would be rounded again by that. Load the "
            "base in 16 bits, or use True, 'gaussian' or 'orthogonal'."
        )


def as_adapter_model(model: Any, *, takes_from_base: bool = False, keeps_base: bool = False) -> AdapterModel:
    """Return ``model``, a PEFT model, as an :class:`AdapterModel`.

    ``takes_from_base``: its adapter is new, and its start has just taken something out of the base. ``keeps_base``: it
    has replaced the base by one that belongs to the adapter.
    """
    if not isinstance(model, AdapterModel):
        model.__class__ = _CLASSES.get(type(model), _CausalAdapter)  # an adapter without a task_type: PeftModel
    model.saves_raw, model.started, model.keeps_base = False, {}, keeps_base
    if takes_from_base:
        model.started = {name: value.detach().to("cpu", copy=True) for name, value in _adapter_weights(model).items()}
    return model


@contextmanager
def raw_weights(model: Any) -> Iterator[None]:
    """Let ``model`` save its trained weights as they are for the block: for a checkpoint, from which a run goes on."""
    is_ours = isinstance(model, (AdapterModel, WholeModel))
    if is_ours:
        model.saves_raw = True
    try:
        yield
    finally:
        if is_ours:
            model.saves_raw = False


def base_bytes_beside(model: Any) -> int:
    """Return the bytes of the base that :meth:`AdapterModel.save_pretrained` writes beside the adapter, 0 for none."""
    if not (isinstance(model, AdapterModel) and model.keeps_base):
        return 0
    return sum(value.nbytes for value in _base_weights(model).values())


def base_beside(adapter: Path) -> Path | None:
    """Return the folder of the base that was saved with an adapter, None where its base lies elsewhere.

    Raises:
        AdapterError: base.json is not what this library writes, or the base is not there.
    """
    folder = _record(adapter).get("base")
    if folder is None:
        return None
    if not (adapter / str(folder) / "config.json").is_file():
        raise AdapterError(
            f"adapter {adapter}: its base was saved with it in {folder}/, which is not there. Copy the whole folder "
            "again."
        )
    return adapter / str(folder)


def _record(adapter: Path) -> dict[str, Any]:
    """Return what base.json of an adapter says, nothing where there is none."""
    file = adapter / _BASE
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
        raise ValueError(f"a {type(record).__name__}")
    except ValueError as error:
        raise _not_ours(file, error) from None


def _not_ours(file: Path, error: Exception) -> AdapterError:
    return AdapterError(f"{file} is not what tunesmith writes ({error!r}). Copy the adapter again.")


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """How the base of a saved adapter was loaded when it was trained; None where it was as its files have it."""

    width: Width | None = None
    stretch: Stretch | None = None
    labels: tuple[str, ...] | None = None
    vocabulary: int | None = None


def trained_on(adapter: Path) -> TrainedOn:
    """Return how the base of a saved adapter was loaded when it was trained.

    Raises:
        AdapterError: base.json is there and is not what this library writes.
    """
    record = _record(adapter)
    try:
        rope, labels, rows = record.get("stretch"), record.get("labels"), record.get("vocabulary")
        return TrainedOn(
            _WIDTHS[record.get("width")],
            None if rope is None else Stretch(rope["scaling"], rope["window"]),
            None if labels is None else tuple(map(str, labels)),
            None if rows is None else int(rows),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _not_ours(adapter / _BASE, error) from None


def trained_for(adapter: Path) -> Any:
    """Return the ``qat_scheme`` that a saved adapter was trained for, or None; see :func:`trained_on`."""
    return _record(adapter).get("qat_scheme")


_WIDTHS: dict[Any, Width | None] = {None: None, "4bit": "4bit", "8bit": "8bit", "fp8": "fp8", "fp8-block": "fp8-block"}


@cache
def _empty_card() -> str:
    from huggingface_hub import ModelCard, ModelCardData

    return str(ModelCard.from_template(ModelCardData()))


class AdapterModel(PeftModel):
    """A PEFT model that saves what belongs to its adapter. One class a task, as in PEFT, at the end of this file.

    Attributes:
        started: A0 and B0 by name, where the start of the first adapter took them out of the base.
        keeps_base: whether the base of the first adapter has no files of its own and is saved with it.
        saves_raw: see :func:`raw_weights`.
    """

    started: dict[str, torch.Tensor]
    keeps_base: bool
    saves_raw: bool

    def save_pretrained(
        self,
        save_directory: Any,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as PEFT does; see the module for what is added.

        Raises:
            AdapterError: an adapter that took something out of the base cannot be saved in the way that is asked for.
            OutputError: there is no room for the base of an adapter that needs its own.
        """
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        converts = bool(self.started) and not self.saves_raw and "default" in names
        if converts and (not safe_serialization or path_initial_model_for_weight_conversion is not None):
            raise AdapterError(
                "this adapter is saved for the base as it was, as safetensors: leave safe_serialization and "
                "path_initial_model_for_weight_conversion out."
            )
        keeps = self.keeps_base and not self.saves_raw and "default" in names
        if keeps and is_main_process:
            _save_base(self, Path(save_directory) / _BESIDE)
        super().save_pretrained(
            save_directory,
            safe_serialization=safe_serialization,
            selected_adapters=selected_adapters,
            save_embedding_layers=starts.embeddings_to_save(save_embedding_layers, self, has_base=keeps),
            is_main_process=is_main_process,
            path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
            **kwargs,
        )
        if not is_main_process:
            return
        if converts:
            _convert(Path(save_directory), self.started)
        for name in names:
            folder = Path(save_directory) / ("" if name == "default" else name)
            _write_base(folder, self)
        if keeps:
            _point_to_base(Path(save_directory))

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write PEFT's card, as PEFT does, but compile its template once and not for every checkpoint."""
        if not (card := Path(output_dir) / "README.md").exists():
            card.write_text(_empty_card(), encoding="utf-8")
        super().create_or_update_model_card(output_dir)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Answer as the base for the block; where the adapter took something out of it, as the base was.

        The base of a LoftQ adapter is the rounded one, here and after a reload alike.

        Raises:
            AdapterError: what was taken out is not known, because the adapter was loaded.
        """
        if not self.started:
            self._refuse_lost_start()
            with super().disable_adapter():
                yield
            return
        if self._has_merged():
            raise AdapterError(
                "this adapter is merged, and it took something out of its base: call unmerge_adapter() before it is "
                "switched off."
            )
        # W = W_res + s B0 A0: with what it started with, the adapter gives the base as it was.
        weights = _adapter_weights(self)
        now = {name: weights[name].detach().clone() for name in self.started}
        whole = [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]
        try:
            for name, first in self.started.items():
                weights[name].data.copy_(first)
            for module in whole:
                module.enable_adapters(False)
            yield
        finally:
            for name, value in now.items():
                weights[name].data.copy_(value)
            for module in whole:
                module.enable_adapters(True)

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; refused where the base lacks what one adapter took out of it, or would lack it then."""
        self._refuse_beside(adapter_name)
        start = getattr(peft_config, "init_lora_weights", True)
        if self.peft_config and adapter_name not in self.peft_config and starts.changes_base(start):
            raise AdapterError(
                f"adapter {adapter_name!r} would start with init_lora_weights={start!r}, which changes the base below "
                "the adapters that are there. Give it a base of its own, or another start."
            )
        return super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, which only warns of tensors that fit nothing and leaves missing ones random.

        Raises:
            AdapterError: the tensors do not fit, or the base lacks what the first adapter took out of it.
        """
        self._refuse_beside(adapter_name)
        is_new = adapter_name not in self.peft_config
        if is_new and (Path(model_id) / _CONFIG).is_file():
            starts.refuse_lost_base(Path(model_id))
            own = [getattr(config, "init_lora_weights", True) for config in self.peft_config.values()]
            given = starts.read_config(Path(model_id)).get("init_lora_weights")
            starts.refuse_shared_base(model_id, [*own, given])
        try:
            result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        except (RuntimeError, TypeError):  # other shapes or kinds: what was read of it must not be left to be chosen
            if is_new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise
        missing = [name for name in result.missing_keys if f".{adapter_name}." in name]
        # A checkpoint of the adapter itself is checked by its own manifest.
        if is_new and (missing or result.unexpected_keys):
            self.delete_adapter(adapter_name)
            what, names = ("are missing", missing) if missing else ("fit nothing", result.unexpected_keys)
            raise AdapterError(f"adapter {model_id} does not fit its base: {len(names)} tensors {what} ({names[0]}).")
        return result

    def unload(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base without adapters, as it was; PEFT's has trained heads, and lacks what was taken out of it.

        Raises:
            AdapterError: what was taken out is not known, because the adapter was loaded.
        """
        if self.started:
            if self._has_merged():
                self.base_model.unmerge_adapter()
            weights = _adapter_weights(self)
            for name, first in self.started.items():
                weights[name].data.copy_(first)
            self.base_model.merge_adapter(["default"])
        else:
            self._refuse_lost_start()
        for module in self.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])  # PEFT would leave the trained one in its place
        base = self.base_model.unload(*args, **kwargs)
        facts_of(base).adapter = None
        return base

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; an adapter that is trained on what comes out is saved with its base."""
        base = self.base_model.merge_and_unload(*args, **kwargs)
        facts = facts_of(base)
        facts.adapter, facts.is_merged = None, True
        return base

    def _has_merged(self) -> bool:
        return any(isinstance(module, BaseTunerLayer) and module.merged for module in self.modules())

    def _refuse_lost_start(self) -> None:
        start = getattr(self.peft_config.get("default"), "init_lora_weights", True)
        if starts.repeats_on_base(start):
            raise AdapterError(
                f"this adapter was saved with init_lora_weights={start!r}, and its base lacks what it started with: it "
                "cannot be switched off. Load the base by itself."
            )

    def _refuse_beside(self, name: str) -> None:
        if name == "default":
            return
        if self.__dict__.get("started"):
            raise AdapterError(
                f"adapter {name!r} would stand on what the first one left of the base. Save the first one and load "
                "both on the base as it was."
            )
        if self.__dict__.get("keeps_base"):
            raise AdapterError(
                f"adapter {name!r} would stand on a base that is saved with the first one (LoftQ rounded it, or an "
                "adapter was merged into it). Save the first one and load it again: then it is a base like any other."
            )


def _write_base(folder: Path, model: Any) -> None:
    """Say in the folder of an adapter how its base was loaded, where that is not as its files have it."""
    facts, labels = facts_of(model), labels_of(model.config)
    rows = model.get_input_embeddings().weight.shape[0]
    record = {
        "width": facts.width,
        "stretch": None if facts.stretch is None else asdict(facts.stretch),
        "labels": list(labels) if TASKS[facts.task].has_labels else None,
        "vocabulary": rows if facts.rows not in (None, rows) else facts.vocabulary,
        "qat_scheme": None if facts.qat is None else facts.qat.record(),
    }
    (folder / _BASE).unlink(missing_ok=True)  # of an adapter that was saved here before
    record = {name: value for name, value in record.items() if value is not None}
    # An adapter that goes on training beside its own base is saved there again.
    named = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if named and Path(named) == lasting_path(folder) / _BESIDE:
        record["base"] = _BESIDE
    if record:
        (folder / _BASE).write_text(json.dumps(record) + "\n", encoding="utf-8")


def _base_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the base below its adapters, by the names that they have without them."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model.get_base_model().state_dict().items():
        parts = name.split(".")
        if any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            continue
        found[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = value
    return found


def _save_base(model: Any, folder: Path) -> None:
    """Write the base below the adapter to ``folder``, whole or not at all, as transformers saves a model."""
    size, facts = base_bytes_beside(model), facts_of(model)
    require_space(folder.parent, size, "the base, saved beside its adapter,")
    with whole_folder(folder) as temporary:
        model.get_base_model().save_pretrained(temporary, state_dict=_base_weights(model))
        if facts.tokenizer is not None:
            facts.tokenizer.save_pretrained(temporary)
    _log.warning(
        "the base (%.0f MiB), which has no files of its own, is saved with its adapter in %s",
        size / 2**20, lasting_path(folder),
    )  # fmt: skip


def _point_to_base(folder: Path) -> None:
    """Make the adapter saved in ``folder`` a plain one on the base that was saved with it."""
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    config |= {"init_lora_weights": True, "loftq_config": {}}
    config["base_model_name_or_path"] = str(lasting_path(folder / _BESIDE))
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # Its config.json has the longer window and the larger vocabulary already.
    kept = {name: value for name, value in _record(folder).items() if name == "labels"}
    (folder / _BASE).write_text(json.dumps({**kept, "base": _BESIDE}) + "\n", encoding="utf-8")


def _adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name="default")
    return {name: value for name, value in found.items() if "lora_A" in name or "lora_B" in name}


def _convert(folder: Path, started: dict[str, torch.Tensor]) -> None:
    """Turn the adapter that was saved in ``folder`` into A', B' and a config that says so."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / _WEIGHTS)
    for name, first in started.items():
        now = tensors[name]
        parts, axis = ([now, first], 0) if "lora_A" in name else ([now, -first], 1)
        tensors[name] = torch.cat([part.to(now.dtype) for part in parts], dim=axis).contiguous()
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    # alpha / r and alpha / sqrt(r) stay what they were at twice the rank.
    factor = 2**0.5 if config.get("use_rslora") else 2
    config |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}
    config |= {"corda_config": None, "lora_ga_config": None}
    for name, times in (("rank_pattern", 2), ("alpha_pattern", factor)):
        config[name] = {key: times * value for key, value in (config.get(name) or {}).items()}
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _CausalAdapter(AdapterModel, PeftModelForCausalLM):
    pass


class _SequenceAdapter(AdapterModel, PeftModelForSequenceClassification):
    pass


class _TokenAdapter(AdapterModel, PeftModelForTokenClassification):
    pass


class _Seq2SeqAdapter(AdapterModel, PeftModelForSeq2SeqLM):
    pass


class _QuestionAdapter(AdapterModel, PeftModelForQuestionAnswering):
    pass


class _FeatureAdapter(AdapterModel, PeftModelForFeatureExtraction):
    pass


_CLASSES: dict[type, type[AdapterModel]] = {
    kind.__bases__[1]: kind
    for kind in (_CausalAdapter, _SequenceAdapter, _TokenAdapter, _Seq2SeqAdapter, _QuestionAdapter, _FeatureAdapter)
}
