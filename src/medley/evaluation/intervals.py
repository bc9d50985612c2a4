"""95 % intervals of shares and of means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054  # of 95 %, two sides
_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value between its bounds, of n cases."""

    value: float
    low: float
    high: float
    n: int

    def percent(self) -> dict[str, float]:
        return {
            "percent": 100 * self.value, "low": 100 * self.low, "high": 100 * self.high, "n": self.n
        }  # fmt: skip


def share_interval(right: int, n: int) -> Interval:
    """Wilson's score interval (1927) of a share. Raises ValueError for n of 0."""
    if n < 1:
        raise ValueError("no cases")
    share, square = right / n, _Z * _Z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half), n)


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """A percentile bootstrap's interval of a mean. Raises ValueError for no values."""
    if not values:
        raise ValueError("no cases")
    array = np.asarray(values, np.float64)
    random = np.random.default_rng(seed)
    means = np.array([random.choice(array, len(array)).mean() for _ in range(_RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high), len(array))
