from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tests.conftest import ROOT

from tunesmith.core.memory import KERNEL_CACHES, SHAPES_KEPT, limit_kernel_caches

# Products of 600 shapes, after which it prints by how many bytes the last 450 have grown the process.
PRODUCTS = """
import torch
from tunesmith.core.memory import limit_kernel_caches, resident_bytes
{limit}
weight, rows = torch.zeros(128, 96).bfloat16(), torch.zeros(700, 96).bfloat16()
for count in range(1, 601):
    rows[:count] @ weight.T
    before = resident_bytes() if count == 150 else before if count > 150 else 0
print(resident_bytes() - before)
"""


def growth(limit: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    ended = subprocess.run(
        [sys.executable, "-c", PRODUCTS.format(limit=limit)], env={**environment, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(ended.stdout)


def test_kernels_of_many_shapes_do_not_pile_up() -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor multiplies bfloat16 without oneDNN, which keeps no kernels then")
    unlimited = growth("")
    assert unlimited > 50 * 2**20
    assert growth("limit_kernel_caches()") < unlimited / 5


def test_limits_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = KERNEL_CACHES
    monkeypatch.setattr(os, "environ", {own: "7"})
    limit_kernel_caches()
    assert os.environ == {own: "7", other: str(SHAPES_KEPT)}
