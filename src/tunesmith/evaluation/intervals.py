"""95 % intervals: of a share, of the difference of two paired shares, and of any statistic by resampling rows.

Pure functions of numbers; what the rows mean is told in metrics.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap", "paired_proportions", "wilson"]

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""

RESAMPLES = 2000
_MOST_WEIGHTS = 4_000_000  # 32 MB of row weights at a time, however many rows there are

Array = NDArray[np.float64]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return Wilson's score interval of the share ``hits / count``; ``count`` is at least 1.

    It stays inside 0 to 1 and is right for few rows and for shares near the ends, where ``p +- 1.96 se`` is not.
    Source: E. B. Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, z2 = hits / count, Z95 * Z95
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    # At the ends centre and half are equal up to rounding; the exact bound is the share itself.
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == count else centre + half
    return low, high


def paired_proportions(wins: int, losses: int, count: int) -> tuple[float, float]:
    """Return the interval of ``(wins - losses) / count`` where the other rows are ties.

    One imagined win and one imagined loss are added, then Wald's formula is used; so no disagreement at all still
    gives an interval of some width.
    Source: D. G. Bonett and R. M. Price 2012, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data".
    """
    won, lost = (wins + 1) / (count + 2), (losses + 1) / (count + 2)
    half = Z95 * math.sqrt((won + lost - (won - lost) ** 2) / (count + 2))
    return max(-1.0, won - lost - half), min(1.0, won - lost + half)


def bootstrap(statistic: Callable[[Array, Array], Array], evidence: Array, *, seed: int) -> tuple[float, float, float]:
    """Return the statistic of ``evidence`` (N, columns) and its 95 % interval from resampled rows.

    ``statistic(evidence, weights)`` gets weights (B, N), how often each row was drawn, and returns (B,). The interval
    is the spread of the resamples around their mean, laid around the value: a resample misses some rare labels, so its
    macro F1 tends to lie on one side of the value, and plain percentiles would leave the value at their edge.
    """
    count = len(evidence)
    value = float(statistic(evidence, np.ones((1, count)))[0])
    rng = np.random.default_rng(seed)
    at_once = max(1, min(RESAMPLES, _MOST_WEIGHTS // count))
    parts = [
        statistic(evidence, rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64))
        for size in _split(RESAMPLES, at_once)
    ]
    resampled = np.concatenate(parts)
    low, high = np.quantile(resampled, [0.025, 0.975]) - resampled.mean()
    return value, value + min(float(low), 0.0), value + max(float(high), 0.0)


def _split(total: int, part: int) -> list[int]:
    """Return ``total`` cut into parts of ``part``, the rest last."""
    return [min(part, total - start) for start in range(0, total, part)]
