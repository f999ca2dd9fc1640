"""What the hosts of all stages queue in a step of the overlap engine (`support.nccl`).

Every stage runs the real engine with its schedule, `Sender` and `Receiver`. Only the passes, the optimizer and
``torch.distributed`` are replaced, by recordings.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from support.nccl import Program

from lime_dist.config.registry import SCHEDULES
from lime_dist.pipeline import transfer
from lime_dist.pipeline.overlap import MicroBatch, OverlapEngine
from lime_dist.pipeline.schedules.base import Pass
from lime_dist.pipeline.schedules.overlapped import OverlappedSchedule
from lime_dist.pipeline.stage_schedule import BackwardInput, BackwardWeight, EvaluationStage, TrainingStage


class FakeDist:
    """What `lime_dist.pipeline.transfer` uses of ``torch.distributed``. A group is the stage's program and the group's name."""

    @staticmethod
    def isend(tensor: Any, peer: int, group: tuple[Program, str]) -> Any:
        return group[0].transfer("send", group[1], 2, tensor)

    @staticmethod
    def irecv(tensor: Any, peer: int, group: tuple[Program, str]) -> Any:
        return group[0].transfer("receive", group[1], 2)


PIECES = 3
"""Of the gradients, with several replicas."""


class RecordingEngine(OverlapEngine):
    """The overlap engine of one stage, without a model and without processes.

    Args:
        replica: of the two that the stage has; None: it has one.
    """

    def __init__(self, schedule: OverlappedSchedule, stage: int, replica: int | None = None) -> None:
        self.program = Program()
        self._replica, self._pieces = replica, PIECES
        self.optimizer: Any = SimpleNamespace(begin_last_pass=lambda: None)
        self.held: list[Counter[str]] = []
        self.stage_id, self.num_stages, self.micro_batches = stage, schedule.stages, schedule.micro_batches
        self.global_steps, self.device, self._shape = 0, torch.device("cpu"), (1, 1)
        self.names_instructions, self._name = False, schedule.name
        self.clock: Any = SimpleNamespace(measuring=nullcontext)
        self.placement: Any = SimpleNamespace(name=str)
        self.module: Any = SimpleNamespace(
            landing=lambda *shape, part: (torch.empty(shape), None),
            stage_parts=[None] * schedule.parts,
            gradient_landing=lambda *shape, part: torch.empty(shape),
        )
        self._in_flight, self._failed, self._waiting = {}, False, None
        self._from_previous = self._from_next = self._to_next = self._to_previous = None
        has_ring = schedule.parts > 1
        before, behind = (stage - 1) % schedule.stages, stage
        own = "" if replica is None else f"replica {replica} "
        there, back = ([(self.program, f"{own}{way} {boundary}") for boundary in (before, behind)] for way in "><")
        after = (stage + 1) % schedule.stages
        if has_ring or stage + 1 < schedule.stages:
            self._to_next, self._from_next = self._sender(after, there[1]), self._receiver(after, back[1])
        if has_ring or stage > 0:
            self._from_previous, self._to_previous = (
                self._receiver(before, there[0]),
                self._sender(before, back[0]),
            )

    def destroy(self) -> None:
        """Nothing to destroy: there is no DeepSpeed engine."""

    def _sender(self, peer: int, group: Any) -> transfer.Sender:
        return transfer.Sender(peer, group, is_queued=True)

    def _receiver(self, peer: int, group: Any) -> transfer.Receiver[Any]:
        return transfer.Receiver(peer, group)

    @property
    def _sees_arrivals(self) -> bool:
        return False

    def _reserve_pipe_buffers(self, num_buffers: int) -> None:
        """The overlap engine uses none."""

    def watching(self, *_: Any, **__: Any) -> Any:
        return nullcontext()

    def _rank_of(self, stage: int) -> int:
        return stage

    def _partners(self, _: Any) -> tuple[()]:
        return ()

    def _load(self, buffer_id: int, part: int) -> None:
        """Copying from pageable memory waits for the compute stream."""
        self._in_flight.setdefault(Pass(buffer_id, part), MicroBatch())
        self.program.compute("read")

    def _forward(self, buffer_id: int, part: int) -> None:
        self.program.compute("forward")
        micro_batch = self._in_flight[Pass(buffer_id, part)]
        micro_batch.payload = torch.empty(1)
        micro_batch.edge = object() if torch.is_grad_enabled() else None

    def _backward(self, buffer_id: int, part: int) -> None:
        self.held.append(self._count_held())
        self.program.compute("backward")
        self._backwards_left -= 1
        if not SCHEDULES[self._name].splits_backward:
            self._go_on_with_sums("backward")
        if part * self.num_stages + self.stage_id:
            micro_batch = self._in_flight[Pass(buffer_id, part)]
            assert micro_batch.inputs is not None
            micro_batch.returned = torch.empty_like(micro_batch.inputs)

    def _weights(self, buffer_id: int, part: int) -> None:
        self.program.compute("weights")
        if buffer_id == self.micro_batches - 1:
            self._go_on_with_sums("weights")

    def _go_on_with_sums(self, kind: str) -> None:
        """All pieces but one start within the last pass of a step."""
        while self._replica is not None and self._backwards_left == 0 and self._pieces > 1:
            self._sum_piece()
            self.program.compute(kind)

    def _sum_piece(self) -> Any:
        self._pieces -= 1
        return self.program.transfer("reduce", f"replicas of {self.stage_id}", 2)

    def _count_held(self) -> Counter[str]:
        """Tensors of transfers for which there is memory during a backward pass."""
        held = Counter[str]()
        if self._to_next is not None and self._from_next is not None:
            held["payloads sent"] = len(self._to_next._under_way)
            held["gradients received"] = 1 + len(self._from_next._posted)
        if self._to_previous is not None and self._from_previous is not None:
            held["gradients sent"] = len(self._to_previous._under_way)
            held["payloads to come"] = len(self._from_previous._posted)
        return held

    def _reduce(self) -> None:
        if self._replica is not None:
            last = self._sum_piece()  # in one queue: when it is over, so are those before it
            last.wait()
        self.program.transfer("reduce", f"all stages of {self._replica}", self.num_stages).wait()

    def _update(self) -> None:
        """The host reads the gradient norm before the update."""
        self.program.compute("read", "update")

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **OverlapEngine._INSTRUCTION_MAP,
        deepspeed_schedule.LoadMicroBatch: _load,
        deepspeed_schedule.ForwardPass: _forward,
        deepspeed_schedule.BackwardPass: _backward,
        BackwardInput: _backward,
        BackwardWeight: _weights,
        deepspeed_schedule.ReduceGrads: _reduce,
        deepspeed_schedule.OptimizerStep: _update,
    }


def programs(schedule: OverlappedSchedule, is_training: bool) -> list[Program]:
    """What the hosts queue in a training step or an evaluation, by stage. Needs `FakeDist` in place of ``torch.distributed``."""
    return [engine.program for engine in engines(schedule, is_training)]


def programs_of_replicas(schedule: OverlappedSchedule) -> list[Program]:
    """What the hosts of two replicas queue in a training step, by replica and stage."""
    return [engine.program for replica in range(2) for engine in engines(schedule, True, replica)]


def engines(schedule: OverlappedSchedule, is_training: bool, replica: int | None = None) -> list[RecordingEngine]:
    """The engines of all stages after a training step or an evaluation, likewise."""
    recording = [RecordingEngine(schedule, stage, replica) for stage in range(schedule.stages)]
    for stage, engine in enumerate(recording):
        with torch.set_grad_enabled(is_training):
            engine._exec_schedule((TrainingStage if is_training else EvaluationStage)(schedule, stage))
    return recording
