"""No decay."""

from __future__ import annotations

from lime_dist.config.registry import LEARNING_RATES
from lime_dist.train.learning_rates.base import LearningRate


@LEARNING_RATES.register("constant")
class Constant(LearningRate):
    """``lr`` to the end of the run; ``min_lr`` bounds the warm-up only."""

    def decay(self, step: int, steps: int) -> float:
        return 1.0
