"""How bitsandbytes stores a quantized matrix (F, D): plain tensors and numbers, read off its modules by the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["EightBitWeight", "FourBitWeight", "Nested", "QuantizedWeight"]


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


QuantizedWeight = FourBitWeight | EightBitWeight
