"""A bound on the seconds of a step that holds for every schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from lime_dist.plan.simulate import Link, StageTimes, transfer_times


def lower_bound(
    times: Sequence[StageTimes],
    payload_bytes: Sequence[int],
    links: Sequence[Link] | Link,
    micro_batches: int,
    *,
    update: float = 0.0,
) -> float:
    """Seconds that no schedule can beat, however many micro-batches it keeps in flight.

    The largest of these, plus the update:

    · The path of one micro-batch through all passes and transfers in both directions, plus (M − 1) · d, where d is the slowest
      single item on it: a stage's forward or backward pass, or a boundary's transfer. The first micro-batch cannot reach
      that item before the path up to it is done, all M pass it one after the other, and the last one has the rest of the
      path left.
    · For each stage, M · (forward + backward), plus one micro-batch's passes and transfers before that stage, in both
      directions. The stage has no work until a micro-batch has come through the stages before it, and it ends with a
      backward pass, after which that micro-batch returns the same way.

    Backward passes count without their ``weights``, which may come at any later time. With those, a stage has M · (forward + backward)
    of work, but no micro-batch need return after the last of it.

    Args:
        times, payload_bytes, links, update: as in `simulate`.
        micro_batches: per replica and step.

    Raises:
        ValueError: as in `simulate`.
    """
    boundaries = transfer_times(times, payload_bytes, links, micro_batches, update)
    backwards = [time.backward - time.weights for time in times]
    passes = [time.forward + backward for time, backward in zip(times, backwards, strict=True)]
    transfers = [duration + latency for duration, latency in boundaries]
    before = [0.0, *accumulate(a + 2 * b for a, b in zip(passes[:-1], transfers, strict=True))]
    there = [0.0, *accumulate(time.forward + b for time, b in zip(times[:-1], transfers, strict=True))]
    slowest = max(*(time.forward for time in times), *backwards, *(duration for duration, _ in boundaries))
    path = before[-1] + passes[-1]
    by_stage = [fill + micro_batches * work for fill, work in zip(before, passes, strict=True)]
    by_stage += [fill + micro_batches * (time.forward + time.backward) for fill, time in zip(there, times, strict=True)]
    return max(path + (micro_batches - 1) * slowest, *by_stage) + update
