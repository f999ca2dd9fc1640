"""One stage's part of a schedule in the form in which DeepSpeed's engine takes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from deepspeed.runtime.pipe import schedule as deepspeed_schedule

from lime_dist.pipeline.schedules.base import Instruction
from lime_dist.pipeline.schedules.overlapped import OverlappedSchedule, forward_instructions


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
"""The class of each kind of instruction, DeepSpeed's or ours. The buffer of an instruction is its micro-batch."""


class TrainingStage(deepspeed_schedule.PipeSchedule):
    """A training step of one stage."""

    def __init__(self, schedule: OverlappedSchedule, stage: int) -> None:
        super().__init__(schedule.micro_batches, schedule.stages, stage)
        self.schedule = schedule

    def steps(self) -> Iterator[list[deepspeed_schedule.PipeInstruction]]:
        return _as_deepspeed(self.schedule.instructions(self.stage_id))

    def num_pipe_buffers(self) -> int:
        return self.schedule.buffers(self.stage_id)


class EvaluationStage(deepspeed_schedule.PipeSchedule):
    """An evaluation on one stage: the forward passes of a schedule's micro-batches."""

    def __init__(self, schedule: OverlappedSchedule, stage: int) -> None:
        super().__init__(schedule.micro_batches, schedule.stages, stage)
        self.schedule = schedule

    def steps(self) -> Iterator[list[deepspeed_schedule.PipeInstruction]]:
        for micro_batch in range(self.micro_batches):
            yield from _as_deepspeed(forward_instructions(self.stages, self.stage_id, micro_batch))

    def num_pipe_buffers(self) -> int:
        return 1


def _as_deepspeed(instructions: Iterable[Instruction]) -> Iterator[list[deepspeed_schedule.PipeInstruction]]:
    for kind, micro_batch in instructions:
        yield [CLASSES[kind]() if micro_batch is None else CLASSES[kind](buffer_id=micro_batch)]
