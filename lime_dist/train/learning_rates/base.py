"""What all learning-rate schedules share: linear warm-up and the lower bound ``optimizer.min_lr``."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lime_dist.config.schema import OptimizerConfig


class LearningRate(ABC):
    """The factor by which the learning rates of all parameter groups are multiplied at a step; at least ``min_lr / lr``.

    Args:
        total_steps: steps of the whole run, warm-up included.
    """

    def __init__(self, config: OptimizerConfig, total_steps: int) -> None:
        self._floor = config.min_lr / config.lr
        self._warmup_steps, self._total_steps = config.warmup_steps, total_steps

    def factor(self, step: int) -> float:
        """The factor of the update after ``step`` earlier updates."""
        if step < self._warmup_steps:
            return max(self._floor, (step + 1) / self._warmup_steps)
        decay = self.decay(step - self._warmup_steps, self._total_steps - self._warmup_steps)
        return self._floor + (1 - self._floor) * decay

    @abstractmethod
    def decay(self, step: int, steps: int) -> float:
        """The course after the warm-up, between 1 (``lr``) and 0 (``min_lr``).

        Args:
            step: steps since the warm-up ended; it may exceed ``steps``.
            steps: steps from the end of the warm-up to the end of the run; not positive if the warm-up never ends.
        """
