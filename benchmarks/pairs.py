"""Intervals of differences between paired runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], comparisons: int = 1) -> Interval:
    """Return the interval of the mean of normally distributed values (Student).

    Args:
        comparisons: number of intervals that shall all hold together with 95 % (Bonferroni).
    """
    half = t_quantile(len(values) - 1, 1 - 0.025 / comparisons) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> Interval | None:
    """Return the 95 % interval of a ratio of means of paired values (Fieller); None if it is unbounded, as the divisor may be 0."""
    count = len(above)
    square = t_quantile(count - 1) ** 2 / count
    covariance = np.cov(above, below)
    a, b = statistics.fmean(above), statistics.fmean(below)
    second, first, constant = (
        b * b - square * covariance[1, 1],
        a * b - square * covariance[0, 1],
        a * a - square * covariance[0, 0],
    )
    if second <= 0:
        return None
    root = math.sqrt(max(0.0, first * first - second * constant))
    return (first - root) / second, (first + root) / second


def t_quantile(freedom: int, level: float = 0.975) -> float:
    """Return a quantile of Student's distribution, by integrating its density."""
    x = np.linspace(0.0, 400.0, 4_000_001)
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    below = 0.5 + np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (x[1] - x[0])
    return float(np.interp(level, below, x))
