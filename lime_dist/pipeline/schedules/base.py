"""What the program needs to know about a pipeline schedule, as one object per schedule.

The classes live in this package, one file each, and register under the name that ``pipeline.schedule`` takes. Engine,
simulator, plan, memory and stage cuts ask the object; nothing outside this package compares names. Planning imports neither
torch nor DeepSpeed, so neither do these files at import.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lime_dist.config.registry import SCHEDULES
from lime_dist.config.schema import Config

if TYPE_CHECKING:
    from lime_dist.pipeline.engine import LimeEngine

Integers = npt.NDArray[np.int64]

LOAD_MICRO_BATCH = "LoadMicroBatch"
FORWARD_PASS, BACKWARD_PASS = "ForwardPass", "BackwardPass"
BACKWARD_INPUT, BACKWARD_WEIGHT = "BackwardInput", "BackwardWeight"
SEND_ACTIVATION, RECV_ACTIVATION = "SendActivation", "RecvActivation"
SEND_GRAD, RECV_GRAD = "SendGrad", "RecvGrad"
REDUCE_TIED_GRADS, REDUCE_GRADS, OPTIMIZER_STEP = "ReduceTiedGrads", "ReduceGrads", "OptimizerStep"

SENDS = frozenset({SEND_ACTIVATION, SEND_GRAD})
RECEIVES = frozenset({RECV_ACTIVATION, RECV_GRAD})
BACKWARDS = frozenset({BACKWARD_PASS, BACKWARD_INPUT})
"""Instructions that make the gradient for the previous stage: a whole backward pass, or all of it but the weight gradients of
projections, which BACKWARD_WEIGHT computes."""


class Instruction(NamedTuple):
    """One thing that a stage does in a step.

    ``kind`` is the name of DeepSpeed's instruction, or of ours (`stage_schedule.py`). ``micro_batch`` is None for an instruction that
    concerns the whole step. ``part`` counts the parts of the stage.
    """

    kind: str
    micro_batch: int | None = None
    part: int = 0


class Pass(NamedTuple):
    """A micro-batch's pass through one part of a stage."""

    micro_batch: int
    part: int = 0


class Mark(NamedTuple):
    """How a timeline shows instructions of a kind."""

    label: str
    colour: str


MARKS = {
    FORWARD_PASS: Mark("forward", "#4477aa"),
    BACKWARD_PASS: Mark("backward", "#66aa77"),
    BACKWARD_INPUT: Mark("backward, inputs", "#66aa77"),
    BACKWARD_WEIGHT: Mark("backward, weights", "#aabb55"),
    RECV_ACTIVATION: Mark("waiting for a payload", "#eecc66"),
    RECV_GRAD: Mark("waiting for a gradient", "#ee8866"),
    SEND_ACTIVATION: Mark("sending a payload", "#bb5566"),
    SEND_GRAD: Mark("sending a gradient", "#994477"),
}


class BoundaryBytes(NamedTuple):
    """Bytes of one micro-batch that a stage exchanges with its neighbours.

    Attributes:
        received: the payload from the previous stage, and its gradient; 0 on the first stage.
        sent: the payload to the next stage, and its gradient; 0 on the last stage.
        landing: memory allocated for a payload when its receive is posted; 0 on the first stage.
    """

    received: int
    sent: int
    landing: int


class MemoryInFlight(NamedTuple):
    """What a stage holds during each backward pass of a step; arrays by backward pass, [micro-batches].

    Attributes:
        micro_batches: micro-batches whose activations are held.
        weight_passes: micro-batches whose weight gradients are held back.
        transfers: bytes of payloads and gradients that are sent, received, or about to be received.
    """

    micro_batches: Integers
    weight_passes: Integers
    transfers: Integers


class Diagonal(NamedTuple):
    """Passes of one kind on several stages, none of which depends on another one of them.

    Attributes:
        kind: FORWARD_PASS, one of `BACKWARDS`, or BACKWARD_WEIGHT.
        stages, micro_batches: arrays of equal length; entry i is the pass of ``micro_batches[i]`` on ``stages[i]``.
    """

    kind: str
    stages: Integers
    micro_batches: Integers


class Schedule(Protocol):
    """The order in which all stages of a pipeline perform one training step.

    Attributes:
        micro_batches: per replica and step.
        stages: number of stages.
        parts: parts of the decoder that each stage holds: the v-th one of stage s is part v · stages + s.
        name: the value of ``pipeline.schedule``.
        engine: the value of ``pipeline.engine`` that runs it.
        holds_parts: a stage may hold several parts.
        encodes_payloads: its engine can send payloads in other forms than one floating-point type (``pipeline.wire_dtype: fp8``).
        is_blocking: a send returns when its bytes have left, and a receive is posted when the stage waits for it.
        splits_backward: whether weight gradients are instructions of their own. If the next receive has not arrived, a stage then
            makes the oldest weight pass that is held back instead of waiting, where its host can tell (`transfer.Receiver`).
        legend: marks of the instructions that can take time, in the order of a timeline's legend.
    """

    micro_batches: int
    stages: int
    parts: int = 1
    name: ClassVar[str]
    engine: ClassVar[str]
    holds_parts: ClassVar[bool] = False
    encodes_payloads: ClassVar[bool]
    is_blocking: ClassVar[bool]
    splits_backward: ClassVar[bool] = False
    legend: ClassVar[Mapping[str, Mark]]

    @classmethod
    @abstractmethod
    def from_config(cls, config: Config, micro_batches: int) -> Schedule:
        """Make the schedule with the keys of the configuration that it has."""

    @classmethod
    @abstractmethod
    def engine_class(cls) -> type[LimeEngine]:
        """The engine that runs it. Imported when called: engines need torch and DeepSpeed."""

    @abstractmethod
    def instructions(self, stage: int) -> Iterator[Instruction]:
        """What ``stage`` does in a step, in order.

        Transfers over a boundary arrive in the order in which they are sent: a stage receives payloads in the order in which
        the previous stage sends them, and gradients in the order in which the next stage sends them.
        """

    @abstractmethod
    def memory_in_flight(self, stage: int, boundary: BoundaryBytes) -> MemoryInFlight:
        """What ``stage`` holds of micro-batches and transfers during each backward pass."""

    def receives_ahead(self, kind: str) -> int:
        """Receives of ``kind`` that a stage posts beyond the one that it waits for, as `posted_ahead` has it. By default none."""
        return 0

    def forwards_before_backwards(self, stage: int) -> Integers:
        """Number of forward passes that ``stage`` has made before each of its backward passes, [micro-batches · parts].

        Counted from the instructions. A schedule overrides it with a formula if planning many settings has to be fast.
        """
        kinds = np.array([each.kind for each in self.instructions(stage)])
        counts: Integers = np.cumsum(kinds == FORWARD_PASS)[np.isin(kinds, list(BACKWARDS))]
        return counts

    def weight_passes_held(self, stage: int) -> Integers:
        """Number of weight passes that ``stage`` holds back during each of its backward passes, [micro-batches]; counted likewise."""
        held = np.zeros(self.micro_batches, np.int64)
        if self.splits_backward:
            kinds = np.array([each.kind for each in self.instructions(stage)])
            is_input = kinds == BACKWARD_INPUT
            held += np.arange(self.micro_batches) - np.cumsum(kinds == BACKWARD_WEIGHT)[is_input]
        return held

    def warm_up(self, stage: int) -> int:
        """Forward passes of ``stage`` before its first backward pass, less one."""
        return int(self.forwards_before_backwards(stage)[0]) - 1

    def micro_batches_in_flight(self, stage: int) -> int:
        """The most micro-batches whose activations ``stage`` holds at a time; each counts once for every part that it is in."""
        forwards = self.forwards_before_backwards(stage)
        return int((forwards - np.arange(len(forwards))).max())

    def held_by_part(self, stage: int) -> Integers:
        """Number of micro-batches whose activations of each part ``stage`` holds during each of its backward passes,
        [parts, backward passes]."""
        forwards = self.forwards_before_backwards(stage)
        held: Integers = (forwards - np.arange(len(forwards)))[None]
        return held

    def part_in_backward(self, stage: int) -> Integers:
        """The part of each of the backward passes of ``stage``."""
        parts = [each.part for each in self.instructions(stage) if each.kind in BACKWARDS]
        return np.array(parts, dtype=np.int64)

    def transfers_of_parts(self, stage: int, boundaries: Sequence[BoundaryBytes]) -> Integers:
        """What `MemoryInFlight` has of transfers, for a stage with several parts.

        Args:
            boundaries: by part.
        """
        raise NotImplementedError

    def buffers(self, stage: int) -> int:
        """Number of pipeline buffers that DeepSpeed's engine reserves on ``stage``."""
        return self.micro_batches_in_flight(stage)

    def diagonals(self) -> Iterable[Diagonal] | None:
        """All passes of a step in an order in which `lime_dist.plan.wavefront` can evaluate them at once.

        Every pass comes after those that it depends on, and the passes of a stage come in the order of its instructions. None
        if the schedule has no such formula: plans simulate it instead, which takes longer.
        """
        return None


def posted_ahead(instructions: Iterable[Instruction], kind: str, ahead: int) -> list[int]:
    """By receive of a kind, in the order of a stage's instructions, the receives that are posted beyond it when the stage waits for it:
    those of the next ``ahead`` passes of their kind. A pass may need no receive; the one after it is not posted instead."""
    passes, numbers, number = (FORWARD_PASS,) if kind == RECV_ACTIVATION else tuple(BACKWARDS), list[int](), 0
    for each in instructions:
        if each.kind == kind:
            numbers.append(number)
        number += each.kind in passes
    return [bisect_right(numbers, own + ahead) - 1 - index for index, own in enumerate(numbers)]


def make_schedule(config: Config, micro_batches: int) -> Schedule:
    """Make the configured schedule for a step of ``micro_batches`` micro-batches per replica."""
    schedule: Schedule = SCHEDULES[config.pipeline.schedule].from_config(config, micro_batches)
    return schedule
