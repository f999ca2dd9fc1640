"""Linear decay."""

from __future__ import annotations

from lime_dist.config.registry import LEARNING_RATES
from lime_dist.train.learning_rates.base import LearningRate


@LEARNING_RATES.register("linear")
class Linear(LearningRate):
    """From ``lr`` to ``min_lr`` along a straight line."""

    def decay(self, step: int, steps: int) -> float:
        return max(0.0, 1 - step / max(1, steps))
