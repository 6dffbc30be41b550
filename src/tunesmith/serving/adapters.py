"""The adapters that a server knows: read from plain PEFT folders, replaced and removed while it answers.

Known ones are found by name. Of their weights the most recently used stay in memory; others are read again when they
are asked for. What is being answered keeps the weights that it began with.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.adapters.model import trained_for, trained_on
from tunesmith.adapters.starts import refuse_lost_base, repeats_on_base
from tunesmith.adapters.state import base_of, own_tokenizer, refuse_other_base
from tunesmith.core.errors import AdapterError, ModelError
from tunesmith.core.names import did_you_mean
from tunesmith.models.aliases import find_model
from tunesmith.models.load import facts_of, local_place
from tunesmith.models.prompts import stop_token_ids
from tunesmith.serving.lora import Adapter

__all__ = ["AdapterShelf", "read_adapter"]

_log = logging.getLogger(__name__)

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Setting of an adapter -> what it is, where two small products beside a shared base cannot do it.
_NOT_BESIDE = {
    "use_dora": "DoRA",
    "modules_to_save": "modules that train whole",
    "lora_bias": "lora_bias",
    "target_parameters": "adapters on expert tensors",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "trained tokens",
}
_REMEDY = "Merge it (tunesmith export) and serve the merged model."


class AdapterShelf:
    """Adapters by name, of which at most ``most`` are in memory.

    Args:
        model: the base, a model of transformers without adapters.
        most: adapters whose weights are kept; the least recently used leave first.
    """

    def __init__(self, model: Any, tokenizer: Any, most: int = 16) -> None:
        self._model, self._tokenizer, self._most = model, tokenizer, most
        self._folders: dict[str, Path] = {}
        self._tokenizers: dict[str, Any] = {}
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def folders(self) -> dict[str, Path]:
        """Name -> folder of every adapter that is known."""
        return dict(self._folders)

    @property
    def loaded(self) -> list[str]:
        """Names of those whose weights are in memory, the least recently used first."""
        return list(self._loaded)

    def add(self, name: str, folder: Path, *, replace: bool = False) -> Adapter:
        """Read the adapter in ``folder`` and know it as ``name``.

        Raises:
            AdapterError: the name is taken and ``replace`` is false, the folder holds no adapter, or it cannot be
                served beside this base.
        """
        if name in self._folders and not replace:
            raise AdapterError(f"adapter {name!r} is loaded already, from {self._folders[name]}. Unload it first.")
        source = find_model(str(folder))
        if source.kind != "adapter":
            raise AdapterError(f"{folder} holds no adapter (adapter_config.json). Give a run's or adapter's folder.")
        place = Path(source.path)
        adapter = read_adapter(name, place, self._model, self._tokenizer)
        for note in adapter.notes:
            _log.warning("adapter %s: %s", name, note)
        with self._lock:
            self._folders[name] = place
            self._tokenizers[name] = adapter.tokenizer
            self._keep(adapter)
        return adapter

    def remove(self, name: str) -> Adapter | None:
        """Forget ``name``; return what was in memory of it. What is being answered with it goes on.

        Raises:
            AdapterError: no adapter has that name.
        """
        with self._lock:
            self._require(name)
            del self._folders[name], self._tokenizers[name]
            return self._loaded.pop(name, None)

    def get(self, name: str) -> Adapter:
        """Return an adapter, read again where it had left memory.

        Raises:
            AdapterError: no adapter has that name, or its folder is no longer what it was.
        """
        with self._lock:
            self._require(name)
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return self._loaded[name]
            folder, tokenizer = self._folders[name], self._tokenizers[name]
        adapter = read_adapter(name, folder, self._model, self._tokenizer, own=tokenizer)
        with self._lock:
            if name in self._loaded:  # meanwhile it was read by another request, or replaced
                return self._loaded[name]
            if self._folders.get(name) == folder:
                self._keep(adapter)
        return adapter

    def holds(self, adapter: Adapter) -> bool:
        """Say whether these weights are those that the name stands for, and in memory."""
        return self._loaded.get(adapter.name) is adapter

    def _require(self, name: str) -> None:
        if name not in self._folders:
            raise AdapterError(f"there is no adapter {name!r}.{did_you_mean(name, list(self._folders))}")

    def _keep(self, adapter: Adapter) -> None:
        self._loaded[adapter.name] = adapter
        self._loaded.move_to_end(adapter.name)
        while len(self._loaded) > self._most:
            gone, _ = self._loaded.popitem(last=False)
            _log.info("adapter %s left memory: %d others were used since", gone, self._most)


_UNREAD: Any = object()


def read_adapter(name: str, folder: Path, model: Any, tokenizer: Any, *, own: Any = _UNREAD) -> Adapter:
    """Read a PEFT folder for the base ``model``.

    Args:
        own: the adapter's tokenizer where it is known from an earlier reading.

    Raises:
        AdapterError: the files are damaged, do not fit the base, or hold what only a merged model can have.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"adapter {name}: its adapter_config.json cannot be read ({error}).") from error
    _refuse(name, folder, config, model)
    try:
        # Read and not mapped: a file that is written anew while its tensors live would end this process.
        stored = load((folder / _WEIGHTS).read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"adapter {name}: {folder / _WEIGHTS} is missing. Copy the adapter again.") from None
    except SafetensorError as error:
        raise AdapterError(f"adapter {name}: {folder / _WEIGHTS} is damaged ({error}). Copy it again.") from error
    pairs = {module: _pair(name, module, stored, config, model) for module in _modules(name, stored, model)}
    if own is _UNREAD:
        own = own_tokenizer(name, folder, tokenizer)
    ends = frozenset(() if own is None else stop_token_ids(model, own))
    return Adapter(name, folder, pairs, own, ends, tuple(_notes(folder, model)))


def _refuse(name: str, folder: Path, config: Any, model: Any) -> None:
    """Raise where the adapter is of a kind, or was trained on a base, that cannot be served here."""
    refuse_lost_base(folder)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise AdapterError(f"adapter {name} is of the kind {kind}; only LORA is served. {_REMEDY}")
    patterns = config.alpha_pattern
    alphas = [config.lora_alpha, *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(isinstance(alpha, (int, float)) for alpha in alphas):
        raise AdapterError(f"adapter {name}: lora_alpha and alpha_pattern in its adapter_config.json are no numbers.")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise AdapterError(f"adapter {name} was trained for {config.task_type} and writes no text.")
    start = getattr(config, "init_lora_weights", True)
    if repeats_on_base(start):
        raise AdapterError(f"adapter {name} (init_lora_weights={start!r}) took a part out of its base. {_REMEDY}")
    for setting, what in _NOT_BESIDE.items():
        if getattr(config, setting, None):
            raise AdapterError(f"adapter {name} uses {what}, which cannot lie beside a shared base. {_REMEDY}")
    if config.bias != "none":
        raise AdapterError(f"adapter {name} trained biases of its base (bias={config.bias!r}). {_REMEDY}")
    refuse_other_base(name, folder, model)


def _modules(name: str, stored: dict[str, torch.Tensor], model: Any) -> list[str]:
    """Return the modules that the tensors of an adapter belong to."""
    found: list[str] = []
    for key, value in stored.items():
        # PEFT saves the weight of an embedding or head beside its adapter.
        owner = key.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
        if key.endswith(".base_layer.weight") and _is_of_base(model, owner, value):
            continue
        module, _, kind = key.removeprefix(_PREFIX).rpartition(".lora_")
        if not module or kind not in ("A.weight", "B.weight"):
            raise AdapterError(f"adapter {name} holds {key}, which is no matrix of a linear layer's adapter. {_REMEDY}")
        if kind == "A.weight":
            found.append(module)
    if not found:
        raise AdapterError(f"adapter {name} holds no weights. Copy the adapter again.")
    return found


def _is_of_base(model: Any, module: str, value: torch.Tensor) -> bool:
    try:
        base = model.get_submodule(module)
        weight = getattr(base, "base", base).weight
    except AttributeError:
        return False
    return weight.shape == value.shape and torch.equal(weight, value.to(weight.device, weight.dtype))


def _pair(
    name: str, module: str, stored: dict[str, torch.Tensor], config: Any, model: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and sB (r, out) of one module, in dtype and place of the base."""
    from peft.utils.other import get_pattern_key

    a, b = stored[f"{_PREFIX}{module}.lora_A.weight"], stored.get(f"{_PREFIX}{module}.lora_B.weight")
    if b is None:
        raise AdapterError(f"adapter {name}: lora_B of {module} is missing. Copy the adapter again.")
    try:
        base = model.get_submodule(module)
        base = getattr(base, "base", base)
        shape = _shape(base)
    except AttributeError:
        raise AdapterError(f"adapter {name} does not fit the base: it has no linear module {module}.") from None
    if a.dim() != 2 or b.dim() != 2 or (a.shape[1], b.shape[0]) != shape or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"adapter {name} does not fit the base: {module} takes {shape[0]} and gives {shape[1]}, the adapter has "
            f"A {tuple(a.shape)} and B {tuple(b.shape)}."
        )
    rank = a.shape[0]
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    scale = alpha / rank**0.5 if config.use_rslora else alpha / rank
    dtype, device = facts_of(model).dtype.dtype, next(base.parameters()).device
    a, sb = a.to(device, dtype, copy=True).contiguous(), (b.float().T * scale).contiguous().to(device, dtype)
    if not torch.isfinite(a).all() or not torch.isfinite(sb).all():
        raise AdapterError(f"adapter {name}: the weights of {module} hold infinite values or NaN. Train it again.")
    return a, sb


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear module: of torch, of bitsandbytes, or GPT-2's Conv1D."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features  # type: ignore[return-value]
    return module.nx, module.nf  # type: ignore[return-value]


def _notes(folder: Path, model: Any) -> list[str]:
    """Return what differs between the base that an adapter was trained on and the one that serves it."""
    facts, own = facts_of(model), trained_on(folder)
    notes: list[str] = []
    if own.width != facts.width:
        names = {None: "in full", "4bit": "in 4 bits", "8bit": "in 8 bits", "fp8": "in float8",
                 "fp8-block": "in float8 by blocks"}  # fmt: skip
        notes.append(f"it was trained on a base {names[own.width]} and is served on one {names[facts.width]}")
    if trained_for(folder) is not None:
        notes.append("it was trained to be rounded (qat_scheme) and is served without rounding")
    try:
        base = base_of(folder)
        if Path(local_place(base)).resolve() != Path(model.name_or_path).resolve():
            notes.append(f"it was trained on {base.name} and is served on {facts.name}")
    except ModelError as error:
        notes.append(f"whether it was trained on {facts.name} cannot be seen: {error}")
    return notes
