"""Cosine decay (arXiv 1608.03983, without restarts)."""

from __future__ import annotations

import math

from lime_dist.config.registry import LEARNING_RATES
from lime_dist.train.learning_rates.base import LearningRate


@LEARNING_RATES.register("cosine")
class Cosine(LearningRate):
    """From ``lr`` to ``min_lr`` along half a cosine."""

    def decay(self, step: int, steps: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
