"""Interleaved 1F1B: every stage holds several parts of the decoder, so that filling and draining the pipeline takes less time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from lime_dist.config.registry import SCHEDULES
from lime_dist.config.schema import Config
from lime_dist.pipeline.schedules.base import (
    BACKWARD_PASS,
    RECEIVES,
    RECV_ACTIVATION,
    RECV_GRAD,
    SEND_ACTIVATION,
    SEND_GRAD,
    BoundaryBytes,
    Instruction,
    Integers,
    Pass,
    posted_ahead,
)
from lime_dist.pipeline.schedules.one_forward_one_backward import one_to_one
from lime_dist.pipeline.schedules.overlapped import OverlappedSchedule


@SCHEDULES.register("interleaved")
@dataclass(frozen=True)
class Interleaved(OverlappedSchedule):
    """Part v·P + s of the decoder is the v-th part of stage s (Megatron-LM, arXiv 2104.04473).

    Micro-batches pass in groups of at least P: a group's forward passes through all stages' first parts, then through their second
    parts, and so on; backward passes likewise, from the last parts to the first. Megatron's groups have P micro-batches, and
    their number must divide. Here any number will do: it is divided into groups of P to 2P − 1 micro-batches as evenly as possible, which
    for a multiple of P are Megatron's. Fewer than P micro-batches are one group, and leave stages idle that wait for the group to come around.

    Every stage makes `warm_up` forward passes, then alternates forward and backward, then makes the remaining backward passes. With
    several parts a stage the warm-up is always Megatron's, that of one extra micro-batch in flight, which hides transfers of up to a
    forward pass. With none, a device that is waited for can deadlock on NCCL (tests/cuda). With more, the first stage would wait for
    what the last one makes only after gradients of the first.
    """

    extra_in_flight: int = 0
    parts: int = 1

    name: ClassVar[str] = "interleaved"
    holds_parts: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: Config, micro_batches: int) -> Interleaved:
        parallel, extra = config.parallel, config.pipeline.extra_in_flight
        return cls(micro_batches, parallel.pipeline_stages, extra, parallel.parts_per_stage)

    @property
    def extra(self) -> int:
        """Extra micro-batches in flight for each boundary downstream."""
        return self.extra_in_flight if self.parts == 1 else 1

    # -- the order of passes ------------------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> list[range]:
        """The micro-batches of each group."""
        count = max(1, self.micro_batches // self.stages)
        bounds = [-(-self.micro_batches * group // count) for group in range(count + 1)]
        return [range(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]

    def forward_order(self) -> Iterator[Pass]:
        for group in self.groups:
            for part in range(self.parts):
                yield from (Pass(micro_batch, part) for micro_batch in group)

    def backward_order(self) -> Iterator[Pass]:
        """The backward passes of every stage."""
        for group in self.groups:
            for part in reversed(range(self.parts)):
                yield from (Pass(micro_batch, part) for micro_batch in group)

    def warm_up(self, stage: int) -> int:
        around = (self.parts - 1) * max(map(len, self.groups))
        downstream = (self.stages - 1 - stage) * (1 + self.extra)
        return min(self.micro_batches * self.parts - 1, around + downstream)

    def instructions(self, stage: int) -> Iterator[Instruction]:
        forwards, backwards, warm_up = list(self.forward_order()), list(self.backward_order()), self.warm_up(stage)
        for each in forwards[:warm_up]:
            yield from self.forward(stage, *each)
        for each, returning in zip(forwards[warm_up:], backwards, strict=False):
            gradient = self.backward(stage, *returning)
            if self._gradient_comes_first(stage, returning):
                yield next(gradient)
            yield from self.forward(stage, *each)
            yield from gradient
        for returning in backwards[len(forwards) - warm_up :]:
            yield from self.backward(stage, *returning)
        yield from self.update()

    @cached_property
    def _in_large_groups(self) -> frozenset[int]:
        """The micro-batches of groups of more than two."""
        return frozenset(micro_batch for group in self.groups if len(group) > 2 for micro_batch in group)

    def _gradient_comes_first(self, stage: int, returning: Pass) -> bool:
        """Whether ``stage`` takes the gradient of a backward pass before the payload of the forward pass that precedes it.

        The second of two stages receives both from the first one, and takes them in the order in which they are sent. A gradient is
        sent after `warm_up` (0) forward passes and as many backward ones as have come before it, less a group, since the first
        stage is a part ahead; the payload after `warm_up` (1) and as many: so the gradient comes first in groups of more than
        `warm_up` (0) − `warm_up` (1) = 2. In the other order the first stage's device could not finish sending the gradient before the
        payload that follows (tests/cuda).
        """
        has_gradient = returning.part < self.parts - 1
        return self.stages == 2 and stage == 1 and has_gradient and returning.micro_batch in self._in_large_groups

    def forwards_before_backwards(self, stage: int) -> Integers:
        return one_to_one(self.micro_batches * self.parts, self.warm_up(stage))

    def held_by_part(self, stage: int) -> Integers:
        number = self.parts * self.micro_batches
        begun = np.array([each.part for each in self.forward_order()])
        ended = np.array([each.part for each in self.backward_order()])
        forwards = self.forwards_before_backwards(stage)
        parts = range(self.parts)
        made = np.array([np.cumsum(begun == part)[forwards - 1] for part in parts])
        over = np.array([np.concatenate([[0], np.cumsum(ended == part)])[:number] for part in parts])
        held: Integers = made - over
        return held

    def transfers_of_parts(self, stage: int, boundaries: Sequence[BoundaryBytes]) -> Integers:
        """The payloads and gradients under way are the newest that the windows allow."""
        instructions = list(self.instructions(stage))
        coming = {kind: deque(posted_ahead(instructions, kind, self.receives_ahead(kind))) for kind in RECEIVES}
        order = {kind: [each.part for each in instructions if each.kind == kind] for kind in RECEIVES}
        payloads = deque[int](maxlen=self.payload_window(stage))
        gradients = deque[int](maxlen=self.gradient_window(stage))
        ahead, taken, held = dict.fromkeys(RECEIVES, 0), dict.fromkeys(RECEIVES, 0), []
        for kind, _, part in instructions:
            if kind in RECEIVES:
                taken[kind] += 1
                ahead[kind] = coming[kind].popleft()
            elif kind == BACKWARD_PASS:
                posted = {each: order[each][taken[each] : taken[each] + ahead[each]] for each in RECEIVES}
                held.append(
                    sum(payloads)
                    + sum(gradients)
                    + boundaries[part].sent
                    + sum(boundaries[each].sent for each in posted[RECV_GRAD])
                    + sum(
                        boundaries[each].landing if each == 0 else boundaries[each].received
                        for each in posted[RECV_ACTIVATION]
                    )
                )
            elif kind == SEND_ACTIVATION:
                payloads.append(boundaries[part].sent)
            elif kind == SEND_GRAD:
                gradients.append(boundaries[part].received)
        return np.array(held, dtype=np.int64)

    # -- transfers ----------------------------------------------------------------------------------------------------

    def receives_ahead(self, kind: str) -> int:
        """As with `OneForwardOneBackward`. A single micro-batch comes around to a stage only after the stage has sent it on."""
        if self.parts > 1 and self.micro_batches == 1:
            return 0
        return min(1, self.extra) if kind == RECV_GRAD else 1

    def evaluation_window(self) -> int:
        """A group's payloads: the first stage receives them from the last one when it has sent them all."""
        return max(map(len, self.groups)) + self.receives_ahead(RECV_ACTIVATION)

    def gradient_window(self, stage: int) -> int:
        """When a stage sends a gradient, the payload that it has received before implies which gradients have arrived. Those from
        the first stage to the last are used a group later."""
        ahead = self.receives_ahead(RECV_ACTIVATION)
        if stage == 0 and self.parts > 1:
            return max(map(len, self.groups)) + 1 + ahead
        return self.extra + 2 + ahead
