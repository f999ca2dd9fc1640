"""Warm-up, stable, decay (arXiv 2404.06395): a constant learning rate that decays over the last part of the run.

Until the decay begins, nothing depends on ``train.steps``. A run that stopped there continues with more steps without a jump.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lime_dist.config.registry import LEARNING_RATES
from lime_dist.config.schema import OptimizerConfig
from lime_dist.train.learning_rates.base import LearningRate

FORMS: dict[str, Callable[[float], float]] = {
    "linear": lambda part: 1 - part,
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    "sqrt": lambda part: 1 - math.sqrt(part),  # arXiv 2405.18392, which found it the best of several
}
"""What is left of ``lr - min_lr`` after a part of the decay, from 0 to 1."""


@LEARNING_RATES.register("wsd")
class WarmupStableDecay(LearningRate):
    """``lr``, then from ``lr`` to ``min_lr`` over the last ``decay_share`` of all steps, in the form ``decay_form``."""

    def __init__(self, config: OptimizerConfig, total_steps: int) -> None:
        super().__init__(config, total_steps)
        self._decay_steps = round(config.decay_share * total_steps)
        self._form = FORMS[config.decay_form]

    def decay(self, step: int, steps: int) -> float:
        decay_steps = min(self._decay_steps, steps)
        decayed = step - (steps - decay_steps)
        return self._form(min(1.0, decayed / max(1, decay_steps))) if decayed > 0 else 1.0
