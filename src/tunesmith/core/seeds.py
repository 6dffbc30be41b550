"""Random numbers that are the same every time, without changing those of anybody else."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from tunesmith.core.errors import SettingsError

__all__ = ["seeded"]


@contextmanager
def seeded(seed: Any) -> Generator[None]:
    """Seed torch, numpy and random for the block and give them back their states."""
    import numpy as np
    import torch

    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise SettingsError(f"random_state={seed!r}: a whole number of at least 0 is needed.")
    seed = int(seed)
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
