"""Is an adapter folder what it should be? Said from its files and the config of its base; no weights are loaded.

The keys must be those that PEFT would write for this base, with its shapes; every lora_B must have left zero, where it
starts; no value may be infinite or NaN. And what servers allow is said: ranks, and kinds that they do not load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.adapters.state import empty_source
from tunesmith.core.errors import AdapterError

__all__ = ["Finding", "check_adapter"]

_WEIGHTS = "adapter_model.safetensors"
# vLLM takes adapters up to --max-lora-rank, which has to be one of these and is 16 where it is not given.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``is_right`` None where it only has to be known."""

    is_right: bool | None
    text: str


def check_adapter(folder: Path) -> list[Finding]:
    """Return what was found in an adapter folder, in the order in which it was looked at.

    Raises:
        AdapterError: there is no adapter, or its files cannot be read.
        ModelError: its base is not there.
    """
    from peft import PeftConfig, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model, base = empty_source(str(folder))
    try:
        stored = load_file(folder / _WEIGHTS)
    except SafetensorError as error:
        raise AdapterError(f"{folder / _WEIGHTS} is corrupt or cut short ({error}). Copy the adapter again.") from error
    config: Any = PeftConfig.from_pretrained(str(folder))
    expected = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    return [
        *_keys({name: tuple(value.shape) for name, value in stored.items()}, expected, base.name),
        *_values(stored),
        *_servers(config, stored),
    ]


def _keys(stored: dict[str, Any], expected: dict[str, Any], base: str) -> Iterator[Finding]:
    missing, foreign = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & stored.keys() if expected[name] != stored[name])
    wrong = {"are missing": missing, "fit no module of the base": foreign, "have another shape": other}
    for what, names in wrong.items():
        if names:
            yield Finding(False, f"{len(names)} tensors {what}: {names[0]}{', ...' if len(names) > 1 else ''}")
    if not any(wrong.values()):
        yield Finding(True, f"{len(stored)} tensors fit the modules of {base}")


def _values(stored: dict[str, torch.Tensor]) -> Iterator[Finding]:
    broken = sorted(name for name, value in stored.items() if not torch.isfinite(value).all())
    if broken:
        yield Finding(False, f"{len(broken)} tensors hold infinite values or NaN: {broken[0]}")
    names = sorted(name for name in stored if "lora_B" in name or "lora_embedding_B" in name)
    zero = [name for name in names if not stored[name].any()]
    if zero and len(zero) == len(names):
        yield Finding(False, "every lora_B is zero: the adapter changes nothing of its base")
    elif zero:
        yield Finding(False, f"{len(zero)} of {len(names)} lora_B are zero, as they start: {zero[0]}")
    elif names:
        yield Finding(True, f"all {len(names)} lora_B have left zero: the adapter differs from its base")


def _servers(config: Any, stored: dict[str, torch.Tensor]) -> Iterator[Finding]:
    rank = max((min(value.shape) for name, value in stored.items() if "lora_A" in name), default=0)
    fits = next((limit for limit in _RANKS if rank <= limit), None)
    if fits is None:
        yield Finding(None, f"rank {rank} is above {_RANKS[-1]}, the most that vLLM takes: merge it to serve it")
    elif fits > _DEFAULT_RANK:
        yield Finding(None, f"rank {rank}: vLLM needs --max-lora-rank {fits}")
    else:
        yield Finding(True, f"rank {rank} is within the default of servers")
    for name, what in (
        ("use_dora", "DoRA"),
        ("modules_to_save", "modules that train whole"),
        ("trainable_token_indices", "tokens that were trained"),
        ("lora_bias", "lora_bias"),
    ):
        if getattr(config, name, None):
            yield Finding(None, f"{what}: servers like vLLM do not load that: merge it to serve it")
