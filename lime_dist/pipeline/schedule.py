"""Which instruction a stage performs when: one forward, one backward (1F1B), with transfers that overlap the computation.

Stage s of P runs ``warm_up_micro_batches`` forward passes, then alternates forward and backward, then finishes the
backward passes that are left. A payload leaves right after its forward pass and a gradient right after its backward pass;
neither blocks (`transfer.py`). With ``extra`` 0 a stage needs the gradient of a micro-batch the moment it could be there at
the earliest, so that every transfer is waited for; each extra micro-batch per boundary downstream gives a transfer there and
back as much time as a forward and a backward pass take. (With one, the schedule is known as eager 1F1B, arXiv 2211.05322.)
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
)

from lime_dist.pipeline.in_flight import warm_up_micro_batches


class OverlapSchedule(PipeSchedule):
    """A training step of one stage. The buffer id of an instruction is its micro-batch."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int, extra: int) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.warm_up = warm_up_micro_batches(micro_batches, stages, stage_id, extra)

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for micro_batch in range(self.warm_up):
            yield self._forward(micro_batch)
        for micro_batch in range(self.warm_up, self.micro_batches):
            yield self._forward(micro_batch)
            yield self._backward(micro_batch - self.warm_up)
        for micro_batch in range(self.micro_batches - self.warm_up, self.micro_batches):
            yield self._backward(micro_batch)
        yield [ReduceGrads(), OptimizerStep()]

    def num_pipe_buffers(self) -> int:
        return self.warm_up + 1

    def _forward(self, micro_batch: int) -> list[PipeInstruction]:
        return forward_instructions(self, micro_batch)

    def _backward(self, micro_batch: int) -> list[PipeInstruction]:
        found: list[PipeInstruction] = [] if self.is_last_stage else [RecvGrad(micro_batch)]
        found.append(BackwardPass(micro_batch))
        return found if self.is_first_stage else [*found, SendGrad(micro_batch)]


class ForwardSchedule(PipeSchedule):
    """An evaluation: forward passes alone."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for micro_batch in range(self.micro_batches):
            yield forward_instructions(self, micro_batch)

    def num_pipe_buffers(self) -> int:
        return 1


def forward_instructions(schedule: PipeSchedule, micro_batch: int) -> list[PipeInstruction]:
    """One micro-batch through one stage, forwards."""
    found: list[PipeInstruction] = [] if schedule.is_first_stage else [RecvActivation(micro_batch)]
    if schedule.is_first_stage or schedule.is_last_stage:
        found.append(LoadMicroBatch(micro_batch))
    found.append(ForwardPass(micro_batch))
    return found if schedule.is_last_stage else [*found, SendActivation(micro_batch)]
