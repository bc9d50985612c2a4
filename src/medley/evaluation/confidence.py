"""95 % intervals of shares, of means, and of what two answer to the same questions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # of 95 %, two sides
_RESAMPLES = 2000
_FEW = 12  # clusters, of which all ways to choose signs are tried
_AT_ONCE = 1 << 22  # numbers that are drawn at a time


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


def interval_of(values: Sequence[float], seed: int = 0) -> Interval:
    """Of a share, where every value is 0 or 1; else of a mean."""
    if all(value in (0, 1) for value in values):
        return share_interval(round(sum(values)), len(values))
    return mean_interval(values, seed)


@dataclass(frozen=True)
class Difference:
    """The mean of b - a with its interval, and p of two sides that it is none."""

    interval: Interval
    p: float


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> Difference:
    """A paired bootstrap of b - a, and p by flipping signs (all ways for a few clusters, else as
    many as are drawn). Values of one cluster (questions about the same picture, say) go together,
    since they are not independent. Raises ValueError for no values."""
    if not a:
        raise ValueError("no cases")
    places = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    sums, counts = np.zeros(len(places)), np.zeros(len(places))
    for first, second, cluster in zip(a, b, clusters, strict=True):
        sums[places[cluster]] += second - first
        counts[places[cluster]] += 1
    random = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // len(places))
    even = np.full(len(places), 1 / len(places))
    means = []
    for start in range(0, _RESAMPLES, size):
        drawn = random.multinomial(len(places), even, size=min(size, _RESAMPLES - start))
        means.append((drawn @ sums) / (drawn @ counts))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    mean = float(sums.sum() / counts.sum())
    interval = Interval(mean, float(low), float(high), len(a))
    return Difference(interval, _flipped(sums[sums != 0], random, size))


def _flipped(sums: NDArray[np.float64], random: np.random.Generator, size: int) -> float:
    """Share of the ways to choose signs that give at least as large a sum."""
    n, least = len(sums), abs(sums.sum()) - 1e-9
    if n <= _FEW:
        ways = np.arange(2**n)[:, None] >> np.arange(n)[None] & 1
        return float((np.abs((1 - 2 * ways) @ sums) >= least).mean())
    hits = 0
    for start in range(0, _RESAMPLES, size):
        signs = random.integers(0, 2, (min(size, _RESAMPLES - start), n))
        hits += int((np.abs((1 - 2 * signs) @ sums) >= least).sum())
    return (hits + 1) / (_RESAMPLES + 1)
