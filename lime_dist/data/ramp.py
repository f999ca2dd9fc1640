"""The global batch size of each step: constant, or growing while the first samples are consumed."""

from __future__ import annotations

from lime_dist.config.schema import BatchRampConfig


class BatchSizes:
    """The global batch size of a step, a pure function of the number of samples that earlier steps consumed.

    With a ramp the batch size starts at ``ramp.start`` and grows by ``ramp.increment`` until it reaches ``size``. The first
    ``ramp.samples`` samples are divided into equal intervals, one for each size before the last; a step has the size of the
    interval in which it starts.
    """

    def __init__(self, size: int, ramp: BatchRampConfig | None = None) -> None:
        self.size, self._ramp = size, ramp
        self._increments = 0 if ramp is None else (size - ramp.start) // ramp.increment

    def at(self, consumed: int) -> int:
        """Batch size of the step that starts after ``consumed`` samples."""
        if self._ramp is None or consumed >= self._ramp.samples:
            return self.size
        return self._ramp.start + self._ramp.increment * (consumed * self._increments // self._ramp.samples)

    def consumed_after(self, steps: int) -> int:
        """Number of samples that the first ``steps`` steps consume."""
        consumed, step = 0, 0
        while step < steps and self._ramp is not None and consumed < self._ramp.samples:
            consumed, step = consumed + self.at(consumed), step + 1
        return consumed + (steps - step) * self.size
