"""95% confidence intervals of proportions, means and paired differences."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # of a two-sided 95% interval
_RESAMPLES = 2000
_MAX_EXACT_CLUSTERS = 12  # up to this number, the permutation test tries all sign flips
_MAX_BATCH_NUMBERS = 1 << 22  # random numbers in memory at the same time


@dataclass(frozen=True)
class Interval:
    """A value, the bounds of its confidence interval, and the sample size n."""

    value: float
    low: float
    high: float
    n: int

    def as_percent(self) -> dict[str, float]:
        return {
            "percent": 100 * self.value, "low": 100 * self.low, "high": 100 * self.high, "n": self.n
        }  # fmt: skip


def proportion_interval(successes: int, n: int) -> Interval:
    """Wilson's score interval (1927) of a proportion. Raises ValueError if n is 0."""
    if n < 1:
        raise ValueError("no values")
    proportion, square = successes / n, _Z * _Z
    center = (proportion + square / (2 * n)) / (1 + square / n)
    half_width = (
        _Z / (1 + square / n) * math.sqrt(proportion * (1 - proportion) / n + square / (4 * n * n))
    )
    return Interval(proportion, max(0.0, center - half_width), min(1.0, center + half_width), n)


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """A percentile bootstrap interval of a mean. Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    array = np.asarray(values, np.float64)
    random = np.random.default_rng(seed)
    means = np.array([random.choice(array, len(array)).mean() for _ in range(_RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high), len(array))


def confidence_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The interval of a proportion if every value is 0 or 1, else the interval of the mean."""
    if all(value in (0, 1) for value in values):
        return proportion_interval(round(sum(values)), len(values))
    return mean_interval(values, seed)


@dataclass(frozen=True)
class Difference:
    """The mean of b - a with its interval, and the two-sided p value of the difference."""

    interval: Interval
    p: float


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> Difference:
    """A paired bootstrap of b - a, and p of a permutation test that flips signs.

    For a few clusters the test is exact, else it samples. Both resample whole clusters (the
    questions about one image, for example), since the values in a cluster are not independent.
    Raises ValueError without values.
    """
    if not a:
        raise ValueError("no values")
    index_of = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    sums, counts = np.zeros(len(index_of)), np.zeros(len(index_of))
    for first, second, cluster in zip(a, b, clusters, strict=True):
        sums[index_of[cluster]] += second - first
        counts[index_of[cluster]] += 1
    random = np.random.default_rng(seed)
    batch = max(1, _MAX_BATCH_NUMBERS // len(index_of))
    uniform = np.full(len(index_of), 1 / len(index_of))
    means = []
    for start in range(0, _RESAMPLES, batch):
        resampled = random.multinomial(len(index_of), uniform, size=min(batch, _RESAMPLES - start))
        means.append((resampled @ sums) / (resampled @ counts))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    mean = float(sums.sum() / counts.sum())
    interval = Interval(mean, float(low), float(high), len(a))
    return Difference(interval, _sign_flip_p(sums[sums != 0], random, batch))


def _sign_flip_p(sums: NDArray[np.float64], random: np.random.Generator, batch: int) -> float:
    """The fraction of sign flips whose absolute sum is at least as large as the observed one."""
    n, observed = len(sums), abs(sums.sum()) - 1e-9
    if n <= _MAX_EXACT_CLUSTERS:
        flips = np.arange(2**n)[:, None] >> np.arange(n)[None] & 1
        return float((np.abs((1 - 2 * flips) @ sums) >= observed).mean())
    hits = 0
    for start in range(0, _RESAMPLES, batch):
        flips = random.integers(0, 2, (min(batch, _RESAMPLES - start), n))
        hits += int((np.abs((1 - 2 * flips) @ sums) >= observed).sum())
    return (hits + 1) / (_RESAMPLES + 1)
