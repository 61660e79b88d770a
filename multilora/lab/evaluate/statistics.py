"""Intervals: how far a mean over these pictures may be from the mean over many.

Pictures are what is drawn again, so an interval speaks of other noise and other prompts for these LoRAs, not of other
LoRAs. Methods are compared picture by picture: all of them drew it from the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
FEW = 6  # pictures that all agree: with fewer, a sign test could not reach 5% (2 / 2^6 = 3%)
_CHUNK = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A mean over `n` pictures with the ends of its 95% interval; nan when there is none."""

    value: float
    low: float
    high: float
    n: int

    @property
    def apart(self) -> bool:
        """Whether 0 lies outside: of a difference, whether the two differ. Never with fewer than FEW pictures."""
        return self.n >= FEW and (self.low > 0 or self.high < 0)


def wilson(found: float, asked: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% Wilson interval of a share. (0, 1) when nothing was asked."""
    if not asked:
        return 0.0, 1.0
    p = found / asked
    centre = (p + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked)) / (1 + z * z / asked)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(found: float, asked: int) -> Interval:
    """A share with its Wilson interval."""
    return Interval(found / asked if asked else math.nan, *wilson(found, asked), asked)


def resampled(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means [resamples], float64, of n values drawn from the n values with replacement."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(data))
    parts = [
        data[rng.integers(0, len(data), (min(rows, resamples - first), len(data)))].mean(1)
        for first in range(0, resamples, rows)
    ]
    return np.concatenate(parts)


def mean(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean with its percentile bootstrap interval.

    Where all values are one share (0, 1, a half), resampling would claim certainty: then it is the Wilson interval of
    n pictures.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return Interval(math.nan, math.nan, math.nan, 0)
    if (data == data[0]).all() and 0.0 <= data[0] <= 1.0:
        return share(float(data.sum()), len(data))
    edge = (1 - LEVEL) / 2
    low, high = np.quantile(resampled(data, resamples, seed), [edge, 1 - edge])
    return Interval(float(data.mean()), float(low), float(high), len(data))


def difference(a: Sequence[float], b: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of a - b over the same pictures, with its paired bootstrap interval.

    Raises ValueError when a and b are not equally long.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values: wanted the same pictures in both")
    apart = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not len(apart):
        return Interval(math.nan, math.nan, math.nan, 0)
    edge = (1 - LEVEL) / 2
    low, high = np.quantile(resampled(apart, resamples, seed), [edge, 1 - edge])
    return Interval(float(apart.mean()), float(low), float(high), len(apart))


def wins(a: Sequence[float], b: Sequence[float]) -> tuple[int, int, int]:
    """(pictures where a is above b, where they are equal, where b is above a)."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values: wanted the same pictures in both")
    apart = np.sign(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))
    return int((apart > 0).sum()), int((apart == 0).sum()), int((apart < 0).sum())
