"""Forward and backward primitives in plain torch, as layers call them; ``test_triton.py`` asks the kernels the same."""

from __future__ import annotations

import pytest
import torch

from .kernel_cases import CASES, Case, compare

# Between norm and rotation plain torch rounds to 16 bits once more than the cases allow.
RUNS = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}")
    for case in CASES
    for dtype in (torch.float32, torch.bfloat16)
    if not (case.name.startswith("norm_rotate") and dtype != torch.float32)
]


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_as_accurate_as_plain_torch(case: Case, dtype: torch.dtype) -> None:
    for comparison in compare(case, "cpu", dtype):
        assert comparison.passes, str(comparison)
