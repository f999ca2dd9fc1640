"""Tells a loss that has jumped from one that moves as usual."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW = 32
"""Losses that a new one is compared with."""
ENOUGH = 8
"""Losses that there must be before one can be a spike."""
MOST = 3
"""Spikes that training may go back for without a new best loss between them: more would be a loop."""


class Spikes:
    """Compares each loss with the median of the `WINDOW` before it that were no spikes.

    Args:
        factor: a loss above so many times the median is a spike; None: none is.
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
        """Whether going back has not helped: more than `MOST` spikes since the best loss."""
        return self._without_best > MOST

    def is_spike(self, loss: float) -> bool:
        """Judge the next loss; one that is not finite is not judged (its step was skipped)."""
        if self._factor is None or not math.isfinite(loss):
            return False
        if len(self._recent) >= ENOUGH and loss > self._factor * self.median:
            self._without_best += 1
            return True
        self._recent.append(loss)
        if loss < self._best:
            self._best, self._without_best = loss, 0
        return False
