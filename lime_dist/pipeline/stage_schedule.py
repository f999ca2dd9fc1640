"""One stage's part of a schedule in the form in which DeepSpeed's engine takes it."""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe import schedule as deepspeed_schedule

from lime_dist.pipeline.schedules.base import Instruction, posted_ahead
from lime_dist.pipeline.schedules.overlapped import OverlappedSchedule


class BackwardInput(deepspeed_schedule.BufferOpInstruction):
    """The backward pass of a micro-batch without the weight gradients of projections."""


class BackwardWeight(deepspeed_schedule.BufferOpInstruction):
    """The weight gradients of a micro-batch that BackwardInput has left."""


CLASSES: dict[str, type[deepspeed_schedule.PipeInstruction]] = {
    each.__name__: each
    for each in (
        deepspeed_schedule.LoadMicroBatch,
        deepspeed_schedule.ForwardPass,
        deepspeed_schedule.BackwardPass,
        BackwardInput,
        BackwardWeight,
        deepspeed_schedule.SendActivation,
        deepspeed_schedule.RecvActivation,
        deepspeed_schedule.SendGrad,
        deepspeed_schedule.RecvGrad,
        deepspeed_schedule.ReduceGrads,
        deepspeed_schedule.OptimizerStep,
    )
}
"""The class of each kind of instruction, DeepSpeed's or ours. The buffer of an instruction is its micro-batch; ``part`` counts the parts
of the stage."""


class StageSchedule(deepspeed_schedule.PipeSchedule):
    """What one stage does, in order."""

    def __init__(self, schedule: OverlappedSchedule, stage: int) -> None:
        super().__init__(schedule.micro_batches, schedule.stages, stage)
        self.schedule = schedule

    def instructions(self) -> Iterator[Instruction]:
        raise NotImplementedError

    def parts_of(self, kind: str) -> list[int]:
        """The part of each instruction of a kind."""
        return [each.part for each in self.instructions() if each.kind == kind]

    def receives_ahead(self, kind: str) -> list[int]:
        """By receive of a kind, the receives that are posted beyond it when the stage waits for it."""
        return posted_ahead(self.instructions(), kind, self.schedule.receives_ahead(kind))

    def steps(self) -> Iterator[list[deepspeed_schedule.PipeInstruction]]:
        for kind, micro_batch, part in self.instructions():
            arguments = {} if micro_batch is None else {"buffer_id": micro_batch, "part": part}
            yield [CLASSES[kind](**arguments)]


class TrainingStage(StageSchedule):
    """A training step of one stage."""

    def instructions(self) -> Iterator[Instruction]:
        return self.schedule.instructions(self.stage_id)

    def num_pipe_buffers(self) -> int:
        return self.schedule.buffers(self.stage_id)


class EvaluationStage(StageSchedule):
    """An evaluation on one stage: the forward passes of a schedule's micro-batches."""

    def instructions(self) -> Iterator[Instruction]:
        return self.schedule.evaluation(self.stage_id)

    def num_pipe_buffers(self) -> int:
        return 1
