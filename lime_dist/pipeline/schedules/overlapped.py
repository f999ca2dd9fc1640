"""What all schedules share that `lime_dist.pipeline.overlap` runs: transfers that overlap the computation.

A payload leaves right after its forward pass and a gradient right after its backward pass. Sends do not block, and receives are
posted ahead of the passes that need them (`lime_dist.pipeline.transfer`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lime_dist.config.schema import Config
from lime_dist.pipeline.schedules.base import (
    BACKWARD_PASS,
    FORWARD_PASS,
    LOAD_MICRO_BATCH,
    MARKS,
    OPTIMIZER_STEP,
    RECV_ACTIVATION,
    RECV_GRAD,
    REDUCE_GRADS,
    SEND_ACTIVATION,
    SEND_GRAD,
    BoundaryBytes,
    Instruction,
    MemoryInFlight,
    Pass,
    Schedule,
)

if TYPE_CHECKING:
    from lime_dist.pipeline.engine import LimeEngine


@dataclass(frozen=True)
class OverlappedSchedule(Schedule):
    """A schedule whose transfers overlap the computation. A subclass gives ``name`` and ``instructions``."""

    micro_batches: int
    stages: int

    engine: ClassVar[str] = "overlap"
    encodes_payloads: ClassVar[bool] = True
    is_blocking: ClassVar[bool] = False
    legend = {kind: MARKS[kind] for kind in (FORWARD_PASS, BACKWARD_PASS, RECV_ACTIVATION, RECV_GRAD)}

    @classmethod
    def from_config(cls, config: Config, micro_batches: int) -> OverlappedSchedule:
        return cls(micro_batches, config.parallel.pipeline_stages)

    @classmethod
    def engine_class(cls) -> type[LimeEngine]:
        from lime_dist.pipeline.overlap import OverlapEngine

        return OverlapEngine

    def receives_ahead(self, kind: str) -> int:
        """One, so that the next transfer can run while the stage computes.

        On NCCL a posted receive occupies the device until the peer sends. If the peer sends only after it has received something
        that this stage has not sent yet, a wait for the whole device in between deadlocks. A schedule for which that can
        happen posts fewer receives ahead (tests/cuda).
        """
        return 1

    def payload_window(self, stage: int) -> int:
        """Payloads that ``stage`` may have under way at a time.

        A full window implies that its oldest send has completed: what depends on that payload has come back.
        """
        return self.micro_batches_in_flight(stage) + self.receives_ahead(RECV_ACTIVATION)

    def evaluation_window(self) -> int:
        """Payloads that a stage may have under way at a time in an evaluation."""
        return 1 + self.receives_ahead(RECV_ACTIVATION)

    def gradient_window(self, stage: int) -> int:
        """Gradients that ``stage`` may have under way at a time, likewise. By default all gradients of a step."""
        return self.micro_batches

    def memory_in_flight(self, stage: int, boundary: BoundaryBytes) -> MemoryInFlight:
        """A stage keeps what it sends until a later send has to wait for it, and the memory of the receives that it has posted."""
        backwards = np.arange(self.micro_batches)
        forwards = self.forwards_before_backwards(stage)
        left = self.micro_batches - 1 - backwards
        transfers = np.minimum(forwards, self.payload_window(stage)) * boundary.sent
        transfers += (1 + np.minimum(self.receives_ahead(RECV_GRAD), left)) * boundary.sent  # gradients that come back
        transfers += np.minimum(backwards, self.gradient_window(stage)) * boundary.received
        transfers += np.minimum(self.receives_ahead(RECV_ACTIVATION), self.micro_batches - forwards) * boundary.landing
        return MemoryInFlight(forwards - backwards, self.weight_passes_held(stage), transfers)

    # -- parts of a step, from which subclasses make their instructions -----------------------------------------------

    def forward(self, stage: int, micro_batch: int, part: int = 0) -> Iterator[Instruction]:
        """One micro-batch through a part of ``stage``, forwards. The first stage loads the tokens and the last one the labels, both with
        their first part."""
        own, last = part * self.stages + stage, self.stages * self.parts - 1
        if own > 0:
            yield Instruction(RECV_ACTIVATION, micro_batch, part)
        if part == 0 and stage in (0, self.stages - 1):
            yield Instruction(LOAD_MICRO_BATCH, micro_batch, part)
        yield Instruction(FORWARD_PASS, micro_batch, part)
        if own < last:
            yield Instruction(SEND_ACTIVATION, micro_batch, part)

    def backward(self, stage: int, micro_batch: int, part: int = 0) -> Iterator[Instruction]:
        """One micro-batch through a part of ``stage``, backwards."""
        own, last = part * self.stages + stage, self.stages * self.parts - 1
        if own < last:
            yield Instruction(RECV_GRAD, micro_batch, part)
        yield Instruction(BACKWARD_PASS, micro_batch, part)
        if own > 0:
            yield Instruction(SEND_GRAD, micro_batch, part)

    def forward_order(self) -> Iterable[Pass]:
        """The forward passes of a stage in the order in which an evaluation makes them."""
        return (Pass(micro_batch) for micro_batch in range(self.micro_batches))

    def evaluation(self, stage: int) -> Iterator[Instruction]:
        """What ``stage`` does in an evaluation."""
        for each in self.forward_order():
            yield from self.forward(stage, *each)

    def update(self) -> Iterator[Instruction]:
        """The end of a step."""
        yield Instruction(REDUCE_GRADS)
        yield Instruction(OPTIMIZER_STEP)
