"""Which device and dtype a run uses, as a value with its reason. Nothing is decided twice or in silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.core.errors import ModelError
from tunesmith.core.names import did_you_mean

if TYPE_CHECKING:
    import torch

__all__ = [
    "DtypeChoice",
    "check_dtype_name",
    "choose_device",
    "choose_dtype",
    "computes_float8",
    "describe_device",
    "dtype_to_train",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "parse_dtype",
]

_DTYPE_NAMES = {
    "float32": "float32", "fp32": "float32", "float": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
    "float64": "float64", "double": "float64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """The dtype of weights and compute, and why it was chosen."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """``"bfloat16"`` for ``torch.bfloat16``."""
        return str(self.dtype).removeprefix("torch.")


def choose_device() -> torch.device:
    """Return the first CUDA device if there is one, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def computes_float8(device: torch.device) -> bool:
    """Return whether ``device`` multiplies float8: a CUDA device of compute capability 8.9 or newer."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def describe_device(device: torch.device) -> str:
    """Return a line for the banner: name, cores or memory."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype for a name such as ``"bf16"`` or ``"torch.bfloat16"``.

    Raises:
        ModelError: the name is no floating dtype known here.
    """
    import torch

    if isinstance(name, torch.dtype) and name.is_floating_point:
        return name
    return getattr(torch, check_dtype_name(str(name)))


def check_dtype_name(name: str) -> str:
    """Return the dtype's own name for one such as ``"bf16"``, without looking at torch.

    Raises:
        ModelError: the name is no floating dtype known here.
    """
    key = name.removeprefix("torch.").lower()
    if key not in _DTYPE_NAMES:
        raise ModelError(
            f"dtype {name!r} is not known.{did_you_mean(key, _DTYPE_NAMES)} "
            "Use bfloat16, float16, float32, or leave it out to let the hardware decide."
        )
    return _DTYPE_NAMES[key]


def choose_dtype(requested: str | torch.dtype | None, device: torch.device) -> DtypeChoice:
    """Return the dtype asked for, or the best one that ``device`` computes.

    None picks bfloat16 where the hardware has bfloat16 units, else float16 on a GPU and float32 on a CPU.

    Raises:
        ModelError: a dtype was asked for that this device cannot train in.
    """
    import torch

    native_bf16, evidence = _bfloat16_units(device)
    if requested is None:
        if native_bf16:
            return DtypeChoice(torch.bfloat16, f"{evidence}")
        if device.type == "cuda":
            return DtypeChoice(torch.float16, f"{evidence} has no bfloat16")
        return DtypeChoice(torch.float32, f"{evidence}, float32 is faster there")
    dtype = parse_dtype(requested)
    if dtype == torch.float16 and device.type == "cpu":
        # Steps of SmolLM2 on one thread of an AMD EPYC: 15 to 19 times as long as in float32.
        raise ModelError("dtype float16 is many times slower than float32 on a CPU. Use bfloat16 or float32.")
    if dtype == torch.bfloat16 and device.type == "cuda" and not native_bf16:
        raise ModelError(f"dtype bfloat16 is not computed by this GPU ({evidence}). Use float16 or float32.")
    if dtype == torch.bfloat16 and not native_bf16:
        # Products of one thread, AVX2, SmolLM2's shapes: 1.4 to 8.6 GFLOP/s instead of 69.
        return DtypeChoice(dtype, f"asked for, but {evidence}: float32 is several times as fast there")
    return DtypeChoice(dtype, "asked for")


def dtype_to_train(requested: str | torch.dtype | None) -> str | torch.dtype | None:
    """Return the dtype for weights that train themselves: ``requested``, or float32 where None would pick float16."""
    # Most of what a step adds to a weight is below what float16 shows.
    is_half = requested is None and str(choose_dtype(None, choose_device()).dtype) == "torch.float16"
    return "float32" if is_half else requested


def _bfloat16_units(device: torch.device) -> tuple[bool, str]:
    """Return whether ``device`` multiplies bfloat16 natively, and what was seen."""
    import torch

    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor}"
    for flag, name in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512-BF16")):
        if getattr(torch.cpu, flag, lambda: False)():
            return True, f"this CPU has {name} units"
    return False, "this CPU has no bfloat16 units"


def is_bfloat16_supported() -> bool:
    """Return whether the default device has bfloat16 units (the name that Unsloth scripts import)."""
    return _bfloat16_units(choose_device())[0]


is_bf16_supported = is_bfloat16_supported
