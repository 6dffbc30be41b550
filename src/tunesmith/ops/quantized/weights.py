"""How a quantized matrix (F, D) is stored: plain tensors and numbers, read off the modules by the engine.

4 and 8 bits are as bitsandbytes has them, float8 is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["BLOCK", "EightBitWeight", "Float8Weight", "FourBitWeight", "Nested", "QuantizedWeight"]

BLOCK = 128
"""Rows and columns of a block of a float8 weight that share a scale."""


@dataclass(frozen=True, slots=True)
class Nested:
    """Scales that are quantized themselves (double quantization): ``table[code] * scales[block] + offset``.

    Attributes:
        table: (256,) float32.
        scales: one float32 a block of scales.
        block: scales that share one.
        offset: (), float32.
    """

    table: torch.Tensor
    scales: torch.Tensor
    block: int
    offset: torch.Tensor


@dataclass(frozen=True, slots=True)
class FourBitWeight:
    """Two entries a byte, the first in the high nibble, row after row; blocks of entries share a scale.

    Attributes:
        codes: uint8, F * D / 2 of them, rounded up.
        table: (16,) float32, what a code means: NF4 or FP4.
        scales: float32, one a block; with ``nested`` uint8.
        block: entries that share a scale.
        shape: (F, D).
        kind: "nf4" or "fp4".
        nested: how ``scales`` are to be read, or None.
    """

    codes: torch.Tensor
    table: torch.Tensor
    scales: torch.Tensor
    block: int
    shape: tuple[int, int]
    kind: str = "nf4"
    nested: Nested | None = None


@dataclass(frozen=True, slots=True)
class EightBitWeight:
    """One signed byte an entry, each row with its own largest value: ``codes * scales / 127``.

    Attributes:
        codes: (F, D) int8.
        scales: (F,) float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(F, D)."""
        return self.codes.shape[0], self.codes.shape[1]


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """A float8 e4m3 an entry, with a scale a row or a scale a block of 128 rows and 128 columns: ``codes * scale``.

    Attributes:
        codes: (F, D) float8_e4m3fn.
        scales: float32, (F, 1); of blocks (F / 128, D / 128), both rounded up.
        is_blocked: whether the scales are those of blocks.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    is_blocked: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(F, D)."""
        return self.codes.shape[0], self.codes.shape[1]


QuantizedWeight = FourBitWeight | EightBitWeight | Float8Weight
