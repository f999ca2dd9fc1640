"""How long one training step of a pipeline takes: the engines' own schedules, played over given stage and link times.

Every stage performs its instructions in order. A boundary has a link in each direction, which carries its transfers in
order, one at a time: a transfer occupies the link for bytes / bandwidth seconds and is there ``latency`` seconds later.

overlap: a send returns at once; receives are posted as `pipeline/transfer.py` posts them, ``AHEAD`` beyond the one that
is waited for. A transfer starts when both ends have posted it and the link is free.
stock: sends and receives block. A transfer starts when both ends are at it; the sender goes on when the bytes are out.

Left out: the loss's way to all ranks, data-parallel reductions, and whatever transfers take from the processors.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from lime_dist.config.schema import Config
from lime_dist.model import cost
from lime_dist.pipeline.in_flight import AHEAD
from lime_dist.pipeline.memory import ITEM_BYTES
from lime_dist.pipeline.partition import stage_bounds

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.schedule import PipeSchedule

SENDS = frozenset({"SendActivation", "SendGrad"})
RECEIVES = frozenset({"RecvActivation", "RecvGrad"})


@dataclass(frozen=True)
class Link:
    """One boundary, the same in both directions (full duplex).

    Args:
        bandwidth: bytes per second, above 0; ``math.inf`` for transfers that take no time.
        latency: seconds between a transfer's last byte leaving and its arrival.
    """

    bandwidth: float
    latency: float = 0.0


@dataclass(frozen=True)
class StageTimes:
    """Seconds that one micro-batch's passes take on one stage."""

    forward: float
    backward: float


class Interval(NamedTuple):
    """What a stage did from ``begin`` to ``end``, in seconds from the step's start.

    ``instruction`` is DeepSpeed's name of it: a pass, a transfer (for as long as it holds the stage up) or OptimizerStep.
    """

    instruction: str
    micro_batch: int
    begin: float
    end: float


@dataclass(frozen=True)
class StepTrace:
    """One simulated step.

    Attributes:
        seconds: until the last stage has finished.
        busy: by stage, seconds of passes and update.
        waiting: by stage, seconds in sends and receives. The rest up to ``seconds`` it is done and idle.
        bubble: by stage, the share of the step in which it does not compute, 1 − busy / seconds.
        intervals: by stage, in order and without gaps.
    """

    seconds: float
    busy: list[float]
    waiting: list[float]
    bubble: list[float]
    intervals: list[list[Interval]]


@dataclass
class _Direction:
    """One direction of one boundary. Lists are by micro-batch, in seconds from the step's start.

    Attributes:
        duration: seconds that a transfer occupies the link.
        sends, receives: when they were posted.
        out: when a transfer's last byte had left; known as soon as both ends have posted.
    """

    duration: float
    latency: float
    sends: list[float] = field(default_factory=list)
    receives: list[float] = field(default_factory=list)
    out: list[float] = field(default_factory=list)

    def post(self, end: list[float], clock: float) -> None:
        """Post the next transfer at an end, ``sends`` or ``receives``."""
        end.append(clock)
        micro_batch = len(self.out)
        if micro_batch < min(len(self.sends), len(self.receives)):
            free = self.out[-1] if self.out else 0.0
            start = max(self.sends[micro_batch], self.receives[micro_batch], free)
            self.out.append(start + self.duration)

    def settled(self, micro_batch: int) -> bool:
        return len(self.out) > micro_batch


_Wait = tuple[str, int, _Direction]  # kind of instruction, micro-batch, and what is not settled yet


def _schedule(engine: str, micro_batches: int, stages: int, stage: int, extra: int) -> PipeSchedule:
    """The engine's own. (Imported here: DeepSpeed takes seconds to import, and not all who plan simulate.)"""
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    from lime_dist.pipeline.schedule import OverlapSchedule

    if engine == "stock":
        return TrainSchedule(micro_batches, stages, stage)
    return OverlapSchedule(micro_batches, stages, stage, extra)


def _instructions(schedule: PipeSchedule) -> Iterator[tuple[str, int]]:
    """Kind and micro-batch, which is the count of the kind so far: the stock schedule's buffer ids are used again."""
    count: Counter[str] = Counter()
    for instructions in schedule.steps():
        for instruction in instructions:
            kind = type(instruction).__name__
            yield kind, count[kind]
            count[kind] += 1


def _perform(
    schedule: PipeSchedule, compute: Mapping[str, float], directions: Mapping[str, _Direction], blocking: bool
) -> Iterator[_Wait | Interval]:
    """Perform a stage's step: yields each interval, and before it, as long as its end is not known, what it waits for.

    Args:
        compute: seconds by kind of instruction.
        directions: by kind of instruction, for those that transfer.
    """
    clock = 0.0
    if not blocking:
        for kind in RECEIVES & directions.keys():
            directions[kind].post(directions[kind].receives, clock)
    for kind, micro_batch in _instructions(schedule):
        begin = clock
        if kind in compute:
            clock += compute[kind]
        elif kind in SENDS | RECEIVES:
            direction, sends = directions[kind], kind in SENDS
            posted = direction.sends if sends else direction.receives
            ahead = 0 if sends or blocking else AHEAD
            while len(posted) < min(micro_batch + 1 + ahead, schedule.micro_batches):
                direction.post(posted, clock)
            if blocking or not sends:
                while not direction.settled(micro_batch):
                    yield kind, micro_batch, direction
                clock = max(clock, direction.out[micro_batch] + (0.0 if sends else direction.latency))
        else:  # LoadMicroBatch, Reduce*: take no time
            continue
        yield Interval(kind, micro_batch, begin, clock)


def _run(stages: Sequence[Iterator[_Wait | Interval]]) -> list[list[Interval]]:
    """Advance every stage as far as it can go, again when its wait is over: only what a neighbour does can end it.

    Raises:
        RuntimeError: all stages that are left wait for each other.
    """
    intervals: list[list[Interval]] = [[] for _ in stages]
    waits: dict[int, _Wait] = {}
    ready = deque(range(len(stages)))
    while ready:
        stage = ready.popleft()
        for found in stages[stage]:
            if not isinstance(found, Interval):
                waits[stage] = found
                break
            intervals[stage].append(found)
        for neighbour in (stage - 1, stage + 1):
            if neighbour in waits:
                _, micro_batch, direction = waits[neighbour]
                if direction.settled(micro_batch):
                    del waits[neighbour]
                    ready.append(neighbour)
    if waits:
        left = (f"stage {stage} in {kind} of micro-batch {index}" for stage, (kind, index, _) in sorted(waits.items()))
        raise RuntimeError(f"deadlock, no stage can advance: {', '.join(left)}")
    return intervals


def simulate(
    times: Sequence[StageTimes],
    payload_bytes: Sequence[int],
    links: Sequence[Link] | Link,
    micro_batches: int,
    *,
    extra: int = 0,
    engine: Literal["overlap", "stock"] = "overlap",
    update: float = 0.0,
) -> StepTrace:
    """Simulate one training step.

    Args:
        times: by stage.
        payload_bytes: by boundary, of one micro-batch's payload; its gradient has as many.
        links: by boundary, or one that all boundaries are like.
        micro_batches: of one replica and step.
        extra: ``pipeline.extra_in_flight``; the stock engine has none.
        update: seconds that each stage spends on the optimizer's step. (That it needs all stages' gradient norms changes
            when it runs, but not when the last stage has finished.)

    Raises:
        ValueError: lengths that do not fit, no stages, no micro-batches, a bandwidth of 0, anything below 0.
        RuntimeError: the schedule deadlocks. The two that are simulated do not.
    """
    if extra < 0:
        raise ValueError(f"extra={extra} must be at least 0")
    boundaries = _boundaries(times, payload_bytes, links, micro_batches, update)
    forwards, backwards = ([_Direction(seconds, latency) for seconds, latency in boundaries] for _ in range(2))
    count, stages = len(times), []
    for stage, time in enumerate(times):
        compute = {"ForwardPass": time.forward, "BackwardPass": time.backward, "OptimizerStep": update}
        directions: dict[str, _Direction] = {}
        if stage > 0:
            directions |= {"RecvActivation": forwards[stage - 1], "SendGrad": backwards[stage - 1]}
        if stage < count - 1:
            directions |= {"SendActivation": forwards[stage], "RecvGrad": backwards[stage]}
        schedule = _schedule(engine, micro_batches, count, stage, extra)
        stages.append(_perform(schedule, compute, directions, blocking=engine == "stock"))
    intervals = _run(stages)
    seconds = max(found[-1].end for found in intervals)
    busy = [sum(x.end - x.begin for x in found if x.instruction not in SENDS | RECEIVES) for found in intervals]
    waiting = [sum(x.end - x.begin for x in found if x.instruction in SENDS | RECEIVES) for found in intervals]
    bubble = [1 - value / seconds if seconds else 0.0 for value in busy]
    return StepTrace(seconds, busy, waiting, bubble, intervals)


def lower_bound(
    times: Sequence[StageTimes],
    payload_bytes: Sequence[int],
    links: Sequence[Link] | Link,
    micro_batches: int,
    *,
    update: float = 0.0,
) -> float:
    """Seconds that no schedule can beat, however many micro-batches it keeps in flight; arguments as for `simulate`.

    The largest of these, plus the update:

    · The way of one micro-batch through all passes and transfers, there and back, and (M − 1) · d for the slowest single
      thing d: a stage's forward or backward pass, or a boundary's transfer. The first micro-batch cannot get there
      sooner than its way there takes, M of them go one after the other, and the last has the rest of the way before it.
    · For each stage, M · (forward + backward), and one micro-batch's passes and transfers before that stage, there and
      back. The stage has nothing to do until a micro-batch has come through the stages before it, and the last thing it
      does is a backward pass, after which that micro-batch goes the same way back.

    Raises:
        ValueError: as `simulate`.
    """
    boundaries = _boundaries(times, payload_bytes, links, micro_batches, update)
    passes = [time.forward + time.backward for time in times]
    crossings = [2 * (duration + latency) for duration, latency in boundaries]
    before = [0.0, *accumulate(a + b for a, b in zip(passes[:-1], crossings, strict=True))]
    slowest = max([max(time.forward, time.backward) for time in times] + [duration for duration, _ in boundaries])
    way = before[-1] + passes[-1]
    by_stage = [fill + micro_batches * work for fill, work in zip(before, passes, strict=True)]
    return max(way + (micro_batches - 1) * slowest, *by_stage) + update


def _boundaries(
    times: Sequence[StageTimes],
    payload_bytes: Sequence[int],
    links: Sequence[Link] | Link,
    micro_batches: int,
    update: float,
) -> list[tuple[float, float]]:
    """By boundary: seconds that a transfer occupies its link, and latency; ValueError for arguments that do not fit."""
    count = len(times) - 1
    links = [links] * count if isinstance(links, Link) else list(links)
    if count < 0 or len(payload_bytes) != count or len(links) != count:
        raise ValueError(
            f"{len(times)} stages, {len(payload_bytes)} payloads, {len(links)} links: n stages have n − 1 of each"
        )
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches} must be at least 1")
    seconds = [value for time in times for value in (time.forward, time.backward)]
    if min([*seconds, *payload_bytes, *(link.latency for link in links), update]) < 0:
        raise ValueError(f"below 0: one of {times}, payload_bytes={payload_bytes}, {links}, update={update}")
    if any(link.bandwidth <= 0 for link in links):
        raise ValueError(f"bandwidths must be above 0: {links}")
    return [(size / link.bandwidth, link.latency) for size, link in zip(payload_bytes, links, strict=True)]


def stage_times(config: Config, flops_per_second: float, bounds: Sequence[int] | None = None) -> list[StageTimes]:
    """Seconds by stage of ``config``'s cuts, at a speed that is the same for all of them.

    Counts what cost.py counts: matrix products, with the head on the last stage; with activation checkpointing, the
    forward pass of the decoder layers once more in backward. (`forecast.machine_times` adds what else moves memory.)

    Args:
        flops_per_second: what one stage reaches.
        bounds: the cuts, where they are known.

    Raises:
        ValueError: a speed that is not above 0.
    """
    if not flops_per_second > 0:
        raise ValueError(f"flops_per_second={flops_per_second} must be above 0")
    model, length = config.model, config.data.sequence_length
    scale = config.train.micro_batch_size * length / flops_per_second
    bounds = stage_bounds(config) if bounds is None else bounds
    found = []
    for start, stop in pairwise(bounds):
        flops = sum(cost.layer_flops(model, length, range(start, stop)), cost.Flops(0.0, 0.0))
        if config.parallel.activation_checkpointing:
            flops += cost.Flops(0.0, flops.forward)
        if stop == bounds[-1]:
            flops += cost.head_flops(model)
        found.append(StageTimes(flops.forward * scale, flops.backward * scale))
    return found


def boundary_bytes(config: Config, bounds: Sequence[int] | None = None) -> list[int]:
    """Bytes by boundary of one micro-batch's payload, in the type that it travels in."""
    item_size = ITEM_BYTES[config.pipeline.wire_dtype or config.precision]
    num_tokens = config.train.micro_batch_size * config.data.sequence_length
    bounds = stage_bounds(config) if bounds is None else bounds
    return [cost.payload_bytes(config.model, bound, num_tokens, item_size) for bound in bounds[1:-1]]
