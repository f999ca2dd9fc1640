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


def mean_and_spread(values: Sequence[float], sign: str = "", digits: int = 4) -> str:
    """Return the mean ± standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{sign}.{digits}f} ± {spread:.{digits}f}"


def t_quantile(freedom: int, level: float = 0.975) -> float:
    """Return a quantile of Student's distribution, by integrating its density."""
    x = np.linspace(0.0, 400.0, 4_000_001)
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    below = 0.5 + np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (x[1] - x[0])
    return float(np.interp(level, below, x))
