"""Seconds of a step without its trace: what `simulate.simulate` computes, for all stages at once, one diagonal after the other.

A schedule groups its passes into diagonals: no pass depends on another pass of its diagonal (`Schedule.diagonals`). Each
diagonal is a few operations on arrays, whatever the number of stages, and several scenarios are evaluated together. Sums and
maxima are those of `simulate`, so the result is the same to the last bit (tests/test_wavefront.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lime_dist.pipeline.schedules.base import (
    BACKWARD_WEIGHT,
    FORWARD_PASS,
    RECV_ACTIVATION,
    RECV_GRAD,
    Integers,
    Schedule,
)

Seconds = npt.NDArray[np.float64]


class _Pass:
    """One kind of pass on all stages: receive from a neighbour, compute, send.

    Args:
        source: offset of the stage that it receives from, −1 or +1.
        duration, latency: [stages, scenarios], of the transfer that a stage receives; 0 at the end of the pipeline, which
            receives none.
        compute: [stages, scenarios].
        ahead: receives that are posted beyond the one that is waited for.
    """

    def __init__(
        self, source: int, duration: Seconds, latency: Seconds, compute: Seconds, micro_batches: int, ahead: int
    ) -> None:
        stages, scenarios = compute.shape
        self.source, self.duration, self.latency, self.compute = source, duration, latency, compute
        self.ahead = ahead
        self.began = np.zeros((stages, micro_batches, scenarios))  # when a stage began to wait for its receive
        self.ended = np.zeros(
            (stages + 2, micro_batches, scenarios)
        )  # by stage + 1; 0 beyond both ends of the pipeline
        self.out = np.zeros((stages, scenarios))  # when the link was free again

    def perform(self, clock: Seconds, stages: Integers, micro_batches: Integers) -> None:
        """Perform the passes of one diagonal and advance the clocks of its stages."""
        now = clock[stages]
        self.began[stages, micro_batches] = now
        posted = self.began[stages, np.maximum(0, micro_batches - self.ahead)]
        start = np.maximum(np.maximum(self.ended[stages + 1 + self.source, micro_batches], posted), self.out[stages])
        out = start + self.duration[stages]
        self.out[stages] = out
        now = np.maximum(now, out + self.latency[stages]) + self.compute[stages]
        self.ended[stages + 1, micro_batches] = now
        clock[stages] = now


def step_seconds(
    schedule: Schedule,
    forward: Seconds,
    backward: Seconds,
    weights: Seconds,
    durations: Seconds,
    latencies: Seconds,
) -> Seconds:
    """Seconds until the last stage has finished, by scenario, without the optimizer's update.

    Args:
        schedule: one that has diagonals.
        forward, backward: [stages, scenarios], of one micro-batch.
        weights: [stages, scenarios], the part of ``backward`` that a schedule can make a pass of its own.
        durations, latencies: [stages − 1, scenarios], of a transfer over each boundary, the same in both directions.

    Raises:
        ValueError: the schedule has no diagonals.
    """
    if (diagonals := schedule.diagonals()) is None:
        raise ValueError(f"the schedule {schedule.name} has no diagonals; simulate it")
    stages, scenarios = forward.shape
    none = np.zeros((1, scenarios))
    durations_there, durations_back = np.concatenate([none, durations]), np.concatenate([durations, none])
    latencies_there, latencies_back = np.concatenate([none, latencies]), np.concatenate([latencies, none])
    micro_batches = schedule.micro_batches
    payloads_ahead, gradients_ahead = map(schedule.receives_ahead, (RECV_ACTIVATION, RECV_GRAD))
    backward = backward - weights if schedule.splits_backward else backward
    forwards = _Pass(-1, durations_there, latencies_there, forward, micro_batches, payloads_ahead)
    backwards = _Pass(+1, durations_back, latencies_back, backward, micro_batches, gradients_ahead)
    clock = np.zeros((stages, scenarios))
    for diagonal in diagonals:
        if diagonal.kind == BACKWARD_WEIGHT:
            clock[diagonal.stages] += weights[diagonal.stages]
        elif len(diagonal.stages):
            chosen = forwards if diagonal.kind == FORWARD_PASS else backwards
            chosen.perform(clock, diagonal.stages, diagonal.micro_batches)
    result: Seconds = clock.max(0)
    return result
