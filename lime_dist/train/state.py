"""How far a run has come: what a checkpoint carries beside the weights. Data order follows from it alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TrainState:
    """Steps taken (skipped ones included) and samples consumed. Nothing else is random: order is a function of these."""

    step: int = 0
    consumed_samples: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
