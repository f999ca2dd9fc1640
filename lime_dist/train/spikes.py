"""Detects loss spikes."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW = 32
"""Number of recent losses with which a new one is compared."""
MIN_LOSSES = 8
"""No loss is a spike before this many have been seen."""
MAX_SPIKES = 3
"""Number of spikes without a new best loss between them for which training goes back; more would be a loop."""


class Spikes:
    """Compares each loss with the median of the last `WINDOW` losses that were not spikes.

    Args:
        factor: a loss above ``factor`` times the median is a spike; None: no loss is.
    """

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._best = math.inf
        self._without_best = 0

    @property
    def median(self) -> float:
        return median(self._recent)

    @property
    def too_many(self) -> bool:
        """Whether going back has not helped: more than `MAX_SPIKES` spikes since the best loss."""
        return self._without_best > MAX_SPIKES

    def is_spike(self, loss: float) -> bool:
        """Whether the next loss is a spike. A loss that is not finite is ignored: its update was skipped."""
        if self._factor is None or not math.isfinite(loss):
            return False
        if len(self._recent) >= MIN_LOSSES and loss > self._factor * self.median:
            self._without_best += 1
            return True
        self._recent.append(loss)
        if loss < self._best:
            self._best, self._without_best = loss, 0
        return False
