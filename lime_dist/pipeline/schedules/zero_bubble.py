"""1F1B whose backward passes come in two parts, so that weight gradients fill the time in which a stage would be idle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lime_dist.config.registry import SCHEDULES
from lime_dist.config.schema import Config
from lime_dist.pipeline.schedules.base import (
    BACKWARD_INPUT,
    BACKWARD_PASS,
    BACKWARD_WEIGHT,
    FORWARD_PASS,
    MARKS,
    RECV_ACTIVATION,
    RECV_GRAD,
    SEND_GRAD,
    Diagonal,
    Instruction,
    Integers,
)
from lime_dist.pipeline.schedules.one_forward_one_backward import OneForwardOneBackward


@SCHEDULES.register("zero_bubble")
@dataclass(frozen=True)
class ZeroBubble(OneForwardOneBackward):
    """1F1B in which a stage makes a weight pass after every backward pass, that of `held_back` micro-batches before, and the rest at
    the end. Weight passes go from the oldest micro-batch to the newest, at whatever time.

    Without extra micro-batches this is ZB-H1 (arXiv 2401.10241, section 2.2). The first gradients return sooner, because later stages hold
    weight passes back, and these fill the end of the step, when earlier stages still make backward passes. Stage s holds back s
    weight passes while it has s forward passes fewer in flight than stage 0: the most memory of a stage is about that of 1F1B.
    Each extra micro-batch in flight per boundary lets a stage hold back as many more.

    Args:
        deferred: weight passes that every stage holds back; None: as above.
    """

    deferred: int | None = None

    name: ClassVar[str] = "zero_bubble"
    splits_backward: ClassVar[bool] = True
    legend = {kind: MARKS[kind] for kind in (FORWARD_PASS, BACKWARD_INPUT, BACKWARD_WEIGHT, RECV_ACTIVATION, RECV_GRAD)}

    @classmethod
    def from_config(cls, config: Config, micro_batches: int) -> ZeroBubble:
        pipeline = config.pipeline
        stages = config.parallel.pipeline_stages
        return cls(micro_batches, stages, pipeline.extra_in_flight, pipeline.deferred_weight_passes)

    def held_back(self, stage: int) -> int:
        """Weight passes that ``stage`` holds back when it begins a backward pass, unless the step has just begun."""
        usual = stage * (1 + self.extra_in_flight)
        return min(self.micro_batches, usual if self.deferred is None else self.deferred)

    def passes(self, stage: int) -> Iterator[Instruction]:
        yield from super().passes(stage)
        for micro_batch in range(self.micro_batches - self.held_back(stage), self.micro_batches):
            yield Instruction(BACKWARD_WEIGHT, micro_batch)

    def backward(self, stage: int, micro_batch: int, part: int = 0) -> Iterator[Instruction]:
        """The gradient leaves before a weight pass is made."""
        if stage < self.stages - 1:
            yield Instruction(RECV_GRAD, micro_batch)
        yield Instruction(BACKWARD_INPUT, micro_batch)
        if stage > 0:
            yield Instruction(SEND_GRAD, micro_batch)
        if (oldest := micro_batch - self.held_back(stage)) >= 0:
            yield Instruction(BACKWARD_WEIGHT, oldest)

    def weight_passes_held(self, stage: int) -> Integers:
        return np.minimum(np.arange(self.micro_batches), self.held_back(stage))

    def diagonals(self) -> Iterator[Diagonal]:
        """Those of 1F1B, each backward diagonal with the weight passes that follow it; then those of the end."""
        held = np.array([self.held_back(stage) for stage in range(self.stages)])
        for diagonal in super().diagonals():
            if diagonal.kind != BACKWARD_PASS:
                yield diagonal
                continue
            yield Diagonal(BACKWARD_INPUT, diagonal.stages, diagonal.micro_batches)
            oldest = diagonal.micro_batches - held[diagonal.stages]
            yield Diagonal(BACKWARD_WEIGHT, diagonal.stages[oldest >= 0], oldest[oldest >= 0])
        for number in range(int(held.max())):
            (stages,) = np.nonzero(held > number)
            yield Diagonal(BACKWARD_WEIGHT, stages, self.micro_batches - held[stages] + number)
