"""DeepSpeed's own schedule: 1F1B with transfers that block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lime_dist.config.registry import SCHEDULES
from lime_dist.config.schema import Config
from lime_dist.pipeline.schedules.base import MARKS, BoundaryBytes, Instruction, Integers, MemoryInFlight, Schedule
from lime_dist.pipeline.schedules.one_forward_one_backward import one_to_one

if TYPE_CHECKING:
    from lime_dist.pipeline.engine import LimeEngine


@SCHEDULES.register("stock")
@dataclass(frozen=True)
class StockSchedule(Schedule):
    """DeepSpeed's `TrainSchedule`, as its engine performs it; the baseline that other schedules are compared with."""

    micro_batches: int
    stages: int

    name: ClassVar[str] = "stock"
    engine: ClassVar[str] = "stock"
    encodes_payloads: ClassVar[bool] = False
    is_blocking: ClassVar[bool] = True
    legend = MARKS

    @classmethod
    def from_config(cls, config: Config, micro_batches: int) -> StockSchedule:
        return cls(micro_batches, config.parallel.pipeline_stages)

    @classmethod
    def engine_class(cls) -> type[LimeEngine]:
        from lime_dist.pipeline.engine import LimeEngine

        return LimeEngine

    def instructions(self, stage: int) -> Iterator[Instruction]:
        """DeepSpeed's instructions. Buffers are reused, so the n-th instruction of a kind concerns micro-batch n."""
        from deepspeed.runtime.pipe.schedule import BufferOpInstruction, TrainSchedule

        counts: Counter[str] = Counter()
        for instructions in TrainSchedule(self.micro_batches, self.stages, stage).steps():
            for instruction in instructions:
                kind = type(instruction).__name__
                yield Instruction(kind, counts[kind] if isinstance(instruction, BufferOpInstruction) else None)
                counts[kind] += 1

    def warm_up(self, stage: int) -> int:
        return min(self.micro_batches - 1, self.stages - 1 - stage)

    def forwards_before_backwards(self, stage: int) -> Integers:
        return one_to_one(self.micro_batches, self.warm_up(stage))

    def buffers(self, stage: int) -> int:
        return max(2, min(self.stages - stage, self.micro_batches))

    def memory_in_flight(self, stage: int, boundary: BoundaryBytes) -> MemoryInFlight:
        """A micro-batch keeps what the stage received and sends; one payload and one gradient are being transferred."""
        held = self.forwards_before_backwards(stage) - np.arange(self.micro_batches)
        exchanged = boundary.received + boundary.sent
        return MemoryInFlight(held, self.weight_passes_held(stage), held * exchanged + exchanged)
