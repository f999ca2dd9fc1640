"""How many samples each step takes: always the same number, or one that grows while the first samples are consumed."""

from __future__ import annotations

from lime_dist.config.schema import BatchRampConfig


class BatchSizes:
    """The global batch size of a step, a pure function of the samples that earlier steps have consumed.

    With a ramp it is ``start`` at first and grows by ``increment`` in equal stretches of ``ramp.samples`` samples, until it is
    ``size``; a step that begins within a stretch has that stretch's size throughout.
    """

    def __init__(self, size: int, ramp: BatchRampConfig | None = None) -> None:
        self.size, self._ramp = size, ramp
        self._increments = 0 if ramp is None else (size - ramp.start) // ramp.increment

    def at(self, consumed: int) -> int:
        """Samples of the step that begins after ``consumed`` samples."""
        if self._ramp is None or consumed >= self._ramp.samples:
            return self.size
        return self._ramp.start + self._ramp.increment * (consumed * self._increments // self._ramp.samples)

    def consumed_after(self, steps: int) -> int:
        """Samples that the first ``steps`` steps consume."""
        consumed, step = 0, 0
        while step < steps and self._ramp is not None and consumed < self._ramp.samples:
            consumed, step = consumed + self.at(consumed), step + 1
        return consumed + (steps - step) * self.size
