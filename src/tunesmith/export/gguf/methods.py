"""The ways to store a model in GGUF, what each may cost, and the names that people know them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.errors import SettingsError
from tunesmith.core.names import did_you_mean

__all__ = ["ALIASES", "METHODS", "Method", "gguf_methods", "is_gguf_method"]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to store the weights.

    Attributes:
        name: as in file names of llama.cpp, in small letters.
        file_type: llama.cpp's number for it (``enum llama_ftype``).
        bar: mean KL divergence to the live model in nats a token above which an export has failed.
        is_native: written without llama.cpp.
        needs_imatrix: llama.cpp makes it only with an importance matrix.
    """

    name: str
    file_type: int
    bar: float
    is_native: bool = False
    needs_imatrix: bool = False


# Bars: two or three times what a model of 135M parameters measures (docs/gguf.md); larger models lose less.
_ALL = (
    Method("f32", 0, 1e-3, is_native=True),
    Method("f16", 1, 1e-3, is_native=True),
    Method("bf16", 32, 2e-3, is_native=True),
    Method("q8_0", 7, 0.02, is_native=True),
    Method("q6_k", 18, 0.04),
    Method("q5_1", 9, 0.5, is_native=True),
    Method("q5_0", 8, 0.4, is_native=True),
    Method("q5_k_m", 17, 0.3),
    Method("q5_k_s", 16, 0.3),
    Method("q4_1", 3, 0.5, is_native=True),
    Method("q4_0", 2, 1.0, is_native=True),
    Method("q4_k_m", 15, 0.3),
    Method("q4_k_s", 14, 0.4),
    Method("iq4_nl", 25, 0.5),
    Method("iq4_xs", 30, 0.5),
    Method("q3_k_l", 13, 0.5),
    Method("q3_k_m", 12, 0.5),
    Method("q3_k_s", 11, 1.5),
    Method("iq3_m", 27, 4.0),
    Method("iq3_s", 26, 4.0),
    Method("iq3_xs", 22, 1.0, needs_imatrix=True),
    Method("iq3_xxs", 23, 1.0, needs_imatrix=True),
    Method("q2_k", 10, 1.5),
    Method("q2_k_s", 21, 1.5, needs_imatrix=True),
    Method("iq2_m", 29, 1.5, needs_imatrix=True),
    Method("iq2_s", 28, 1.5, needs_imatrix=True),
    Method("iq2_xs", 20, 2.0, needs_imatrix=True),
    Method("iq2_xxs", 19, 2.0, needs_imatrix=True),
    Method("iq1_m", 31, 4.0, needs_imatrix=True),
    Method("iq1_s", 24, 4.0, needs_imatrix=True),
)
METHODS = {method.name: method for method in _ALL}
"""Name -> method, the nearest to the model first."""

ALIASES = {
    "not_quantized": "f16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "q3_k": "q3_k_m",
}
"""Other names -> methods; ``not_quantized`` is ``bf16`` for a model in bfloat16, which float16 cannot hold."""


def is_gguf_method(name: str) -> bool:
    """Return whether ``name`` is a method or an alias, in any case of letters."""
    return name.lower() in METHODS or name.lower() in ALIASES


def gguf_methods(asked: str | Sequence[str], *, dtype: str, imatrix: bool = False) -> list[Method]:
    """Return the methods that are asked for, each once and in that order.

    Args:
        asked: one name or several, in any case of letters.
        dtype: of the model, "float32", "bfloat16" or "float16".
        imatrix: whether an importance matrix is at hand.
    Raises:
        SettingsError: an unknown name, or a method that needs an importance matrix.
    """
    names = [asked] if isinstance(asked, str) else list(asked)
    if not names:
        raise SettingsError("quantization_method is empty. Name at least one, such as 'q8_0'.")
    found: dict[str, Method] = {}
    for given in names:
        if not isinstance(given, str):
            raise SettingsError(f"quantization_method={asked!r}: a name or a list of names is needed, such as 'q8_0'.")
        name = given.lower()
        if name == "not_quantized" and dtype == "bfloat16":
            name = "bf16"
        name = ALIASES.get(name, name)
        if name not in METHODS:
            known = (*METHODS, *ALIASES)
            raise SettingsError(f"quantization_method={given!r}: use {', '.join(known)}.{did_you_mean(name, known)}")
        if METHODS[name].needs_imatrix and not imatrix:
            raise SettingsError(
                f"quantization_method={given!r} needs an importance matrix: give imatrix_file, made by llama-imatrix "
                "from the f16 file, or use iq4_xs or q3_k_m, which need none."
            )
        found[name] = METHODS[name]
    return list(found.values())
