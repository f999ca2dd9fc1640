"""Seconds of one training step of a pipeline: a schedule's instructions, performed with given stage and link times.

Every stage performs its instructions in order. Two stages that are neighbours have a link in each direction, which carries its transfers
in order, one at a time: a transfer occupies the link for bytes / bandwidth seconds and arrives ``latency`` seconds later.

If transfers overlap the computation, a send returns at once and receives are posted as `pipeline/transfer.py` posts them: when
a stage turns to a receive, it posts this one and `Schedule.receives_ahead` beyond it. A transfer starts when both ends have
posted it and the link is free.
If transfers block, a transfer starts when both ends have reached it, and the sender continues when the bytes are out.

A stage that holds weight passes back can go on with them while it waits for a receive (``fill_waits``), as the engine does where
its host knows what has arrived; otherwise they come in the order of the schedule. A pass is interrupted when the receive is over: it
consists of many products.

Left out: broadcasting the loss, data-parallel reductions, and processor time that transfers take.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lime_dist.pipeline.schedules.base import (
    BACKWARD_INPUT,
    BACKWARD_PASS,
    BACKWARD_WEIGHT,
    FORWARD_PASS,
    LOAD_MICRO_BATCH,
    OPTIMIZER_STEP,
    RECEIVES,
    RECV_ACTIVATION,
    RECV_GRAD,
    REDUCE_GRADS,
    REDUCE_TIED_GRADS,
    SEND_ACTIVATION,
    SEND_GRAD,
    SENDS,
    Schedule,
    posted_ahead,
)

WITHOUT_TIME = frozenset({LOAD_MICRO_BATCH, REDUCE_TIED_GRADS, REDUCE_GRADS})
"""Instructions that the simulation skips."""
BEFORE = frozenset({RECV_ACTIVATION, SEND_GRAD})
"""Transfers over the boundary before a part; the others cross the one behind it."""


@dataclass(frozen=True)
class Link:
    """A boundary's link, the same in both directions (full duplex).

    Args:
        bandwidth: bytes per second, above 0; ``math.inf`` for transfers that take no time.
        latency: seconds between sending a transfer's last byte and its arrival.
    """

    bandwidth: float
    latency: float = 0.0


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch's passes on one stage.

    Attributes:
        weights: the part of ``backward`` that a schedule can make a pass of its own, the weight gradients of projections.
    """

    forward: float
    backward: float
    weights: float = 0.0


class Interval(NamedTuple):
    """What a stage did from ``begin`` to ``end``, in seconds from the start of the step.

    ``instruction`` is the kind of instruction: a pass, a transfer (for as long as the stage waits for it) or OptimizerStep,
    whose ``micro_batch`` is 0. ``part`` counts the parts of the stage.
    """

    instruction: str
    micro_batch: int
    begin: float
    end: float
    part: int = 0


@dataclass(frozen=True)
class StepTrace:
    """One simulated step.

    Attributes:
        seconds: until the last stage has finished.
        busy: by stage, seconds of passes and update.
        waiting: by stage, seconds in sends and receives. For the rest of ``seconds`` the stage has finished and is idle.
        bubble: by stage, the fraction of the step in which it does not compute, 1 − busy / seconds.
        intervals: by stage, in order and without gaps.
    """

    seconds: float
    busy: list[float]
    waiting: list[float]
    bubble: list[float]
    intervals: list[list[Interval]]


@dataclass
class _Direction:
    """One direction of one boundary. Lists are in the order of its transfers, in seconds from the start of the step.

    Attributes:
        sends, receives: when each end posted them.
        out: when a transfer's last byte had left; known as soon as both ends have posted it.
    """

    sends: list[float] = field(default_factory=list)
    receives: list[float] = field(default_factory=list)
    out: list[float] = field(default_factory=list)

    def post(self, end: list[float], clock: float, duration: float) -> None:
        """Post the next transfer at one end, ``sends`` or ``receives``; it occupies the link for ``duration`` seconds."""
        end.append(clock)
        transfer = len(self.out)
        if transfer < min(len(self.sends), len(self.receives)):
            free = self.out[-1] if self.out else 0.0
            start = max(self.sends[transfer], self.receives[transfer], free)
            self.out.append(start + duration)

    def is_settled(self, transfer: int) -> bool:
        return len(self.out) > transfer


class _Wait(NamedTuple):
    """An instruction that cannot end yet, and the transfer that it waits for."""

    instruction: str
    micro_batch: int
    direction: _Direction
    transfer: int

    @property
    def is_over(self) -> bool:
        return self.direction.is_settled(self.transfer)


def _perform(
    schedule: Schedule,
    stage: int,
    compute: Mapping[tuple[str, int], float],
    directions: Mapping[str, _Direction],
    boundaries: Sequence[tuple[float, float]],
    fill_waits: bool,
) -> Iterator[_Wait | Interval]:
    """Perform a stage's step: yield each interval; before it, yield what it waits for as long as its end is not known.

    Args:
        compute: seconds by kind of instruction and part of the stage.
        directions: by kind of instruction, for transfers.
        boundaries: `transfer_times`.

    Raises:
        ValueError: an instruction that is neither a transfer of this stage nor has a duration.
    """
    clock, blocks = 0.0, schedule.is_blocking
    transfers: Counter[str] = Counter()
    held_back: dict[int, float] = {}  # by micro-batch, seconds of its weight pass that are left
    instructions = list(schedule.instructions(stage))
    crossed: dict[str, list[int]] = {kind: [] for kind in directions}  # by kind, the boundaries that transfers cross
    for kind, _, part in instructions:
        if kind in directions:
            crossed[kind].append(part * schedule.stages + stage - (kind in BEFORE))
    ahead = {kind: posted_ahead(instructions, kind, schedule.receives_ahead(kind)) for kind in RECEIVES}
    for kind, micro_batch, part in instructions:
        begin, index = clock, micro_batch or 0
        if kind == BACKWARD_INPUT:
            held_back[index] = compute[BACKWARD_WEIGHT, part]
        if kind == BACKWARD_WEIGHT:
            clock += held_back.pop(index)
        elif (kind, part) in compute:
            clock += compute[kind, part]
        elif kind in directions:
            direction, sends, transfer = directions[kind], kind in SENDS, transfers[kind]
            transfers[kind] += 1
            posted = direction.sends if sends else direction.receives
            beyond = 0 if sends else ahead[kind][transfer]
            for boundary in crossed[kind][len(posted) : transfer + 1 + beyond]:
                direction.post(posted, clock, boundaries[boundary][0])
            if blocks or not sends:
                while not direction.is_settled(transfer):
                    yield _Wait(kind, index, direction, transfer)
                over = direction.out[transfer] + (0.0 if sends else boundaries[crossed[kind][transfer]][1])
                for waiting, left in held_back.items() if fill_waits and not sends else ():
                    if spent := min(left, max(0.0, over - clock)):
                        held_back[waiting] -= spent
                        yield Interval(BACKWARD_WEIGHT, waiting, clock, clock := clock + spent)
                begin, clock = clock, max(clock, over)
        elif kind in WITHOUT_TIME:
            continue
        else:
            raise ValueError(f"the schedule {schedule.name} has {kind} on stage {stage}, whose duration is unknown")
        yield Interval(kind, index, begin, clock, part)


def _run(stages: Sequence[Iterator[_Wait | Interval]]) -> list[list[Interval]]:
    """Advance every stage as far as possible, and again when its wait is over, which only a neighbour can bring about.

    Raises:
        RuntimeError: all unfinished stages wait for each other.
    """
    intervals: list[list[Interval]] = [[] for _ in stages]
    waits: dict[int, _Wait] = {}
    ready = deque(range(len(stages)))
    while ready:
        stage = ready.popleft()
        for event in stages[stage]:
            if isinstance(event, _Wait):
                waits[stage] = event
                break
            intervals[stage].append(event)
        for neighbour in ((stage - 1) % len(stages), (stage + 1) % len(stages)):
            if neighbour in waits and waits[neighbour].is_over:
                del waits[neighbour]
                ready.append(neighbour)
    if waits:
        where = (
            f"stage {stage} in {wait.instruction} of micro-batch {wait.micro_batch}"
            for stage, wait in sorted(waits.items())
        )
        raise RuntimeError(f"deadlock, no stage can advance: {', '.join(where)}")
    return intervals


def simulate(
    times: Sequence[StageTimes],
    payload_bytes: Sequence[int],
    links: Sequence[Link] | Link,
    schedule: Schedule,
    *,
    update: float = 0.0,
    fill_waits: bool = False,
) -> StepTrace:
    """Simulate one training step.

    Args:
        times: by part of the decoder; with one part a stage, by stage.
        payload_bytes: by boundary between parts, of one micro-batch's payload; its gradient has as many.
        links: by boundary, or one for all boundaries.
        schedule: of the step; it has the number of micro-batches.
        update: seconds that each stage spends on the optimizer's step. (It waits for the gradient norms of all stages. That
            changes when it runs, but not when the last stage has finished.)
        fill_waits: stages go on with weight passes that are held back while they wait for a receive.

    Raises:
        ValueError: lengths that do not match, no stages, no micro-batches, a bandwidth of 0, a negative value, or an
            instruction of unknown duration.
        RuntimeError: the schedule deadlocks.
    """
    boundaries = transfer_times(times, payload_bytes, links, schedule.micro_batches, update)
    if schedule.stages * schedule.parts != len(times):
        parts = f"{schedule.stages} stages" + (f" of {schedule.parts} parts" if schedule.parts > 1 else "")
        raise ValueError(f"the schedule has {parts}, but times are given for {len(times)}")
    # By the stage before a link; the last stage has one to the first if stages hold several parts.
    forwards, backwards = ([_Direction() for _ in range(schedule.stages)] for _ in range(2))
    stages = []
    for stage in range(schedule.stages):
        compute: dict[tuple[str, int], float] = {(OPTIMIZER_STEP, 0): update}
        for part, time in enumerate(times[stage :: schedule.stages]):
            of_part = {
                FORWARD_PASS: time.forward,
                BACKWARD_PASS: time.backward,
                BACKWARD_INPUT: time.backward - time.weights,
                BACKWARD_WEIGHT: time.weights,
            }
            compute |= {(kind, part): seconds for kind, seconds in of_part.items()}
        directions: dict[str, _Direction] = {}
        if stage > 0 or schedule.parts > 1:
            directions |= {RECV_ACTIVATION: forwards[stage - 1], SEND_GRAD: backwards[stage - 1]}
        if stage < schedule.stages - 1 or schedule.parts > 1:
            directions |= {SEND_ACTIVATION: forwards[stage], RECV_GRAD: backwards[stage]}
        stages.append(_perform(schedule, stage, compute, directions, boundaries, fill_waits))
    intervals = _run(stages)
    seconds = max(own[-1].end for own in intervals)
    transfers = SENDS | RECEIVES
    busy = [sum(x.end - x.begin for x in own if x.instruction not in transfers) for own in intervals]
    waiting = [sum(x.end - x.begin for x in own if x.instruction in transfers) for own in intervals]
    bubble = [1 - value / seconds if seconds else 0.0 for value in busy]
    return StepTrace(seconds, busy, waiting, bubble, intervals)


def transfer_times(
    times: Sequence[StageTimes],
    payload_bytes: Sequence[int],
    links: Sequence[Link] | Link,
    micro_batches: int,
    update: float,
) -> list[tuple[float, float]]:
    """By boundary: seconds that a transfer occupies its link, and latency. ValueError for impossible arguments."""
    count = len(times) - 1
    links = [links] * count if isinstance(links, Link) else list(links)
    if count < 0 or len(payload_bytes) != count or len(links) != count:
        raise ValueError(
            f"{len(times)} stages, {len(payload_bytes)} payloads, {len(links)} links: n stages need n − 1 of each"
        )
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches} must be at least 1")
    seconds = [value for time in times for value in (time.forward, time.backward - time.weights, time.weights)]
    if min([*seconds, *payload_bytes, *(link.latency for link in links), update]) < 0:
        raise ValueError(f"negative: one of {times}, payload_bytes={payload_bytes}, {links}, update={update}")
    if any(link.bandwidth <= 0 for link in links):
        raise ValueError(f"bandwidths must be above 0: {links}")
    return [(size / link.bandwidth, link.latency) for size, link in zip(payload_bytes, links, strict=True)]
