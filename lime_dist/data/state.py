"""How far a run has come. The order of the data follows from it alone; a checkpoint stores it beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TrainState:
    """Progress of a run. The order of samples is a function of it, and nothing else in a run is random.

    Attributes:
        step: steps taken, including steps whose update was skipped.
        consumed_samples: samples consumed by these steps.
    """

    step: int = 0
    consumed_samples: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
