"""How long an overlapped step takes, without its trace: `simulate.simulate` for all stages at once, diagonal by diagonal.

The passes of a step fall into diagonals such that no pass of a diagonal needs another one of it. With w warm-up passes on
stage s of P, forward pass m < w + 1 is on diagonal s + m; after these, backward pass m is on diagonal −s + 2m, and forward
pass m > w on −s + 2(m − w) − 1. So a step is some 2·(micro-batches + stages) operations on arrays, whatever the number of
stages, and several scenarios go along in one. Sums and maxima are those of `simulate`, so that the result is the same to
the last bit (tests/test_wavefront.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lime_dist.pipeline.in_flight import AHEAD, warm_up_micro_batches

Seconds = npt.NDArray[np.float64]


class _Pass:
    """One kind of pass on all stages: receives from the neighbour, computes, and has sent when it ends.

    Args:
        source: −1 or +1: where the stage that it receives from is.
        duration, latency, compute: [stages, scenarios]; no transfer comes in at the end of the pipeline: 0 there.
    """

    def __init__(self, source: int, duration: Seconds, latency: Seconds, compute: Seconds, micro_batches: int) -> None:
        stages, scenarios = compute.shape
        self.source, self.duration, self.latency, self.compute = source, duration, latency, compute
        self.began = np.zeros((stages, micro_batches, scenarios))  # when a stage turned to its receive
        self.ended = np.zeros((stages + 2, micro_batches, scenarios))  # by stage + 1; beyond the ends all is there at 0
        self.out = np.zeros((stages, scenarios))  # when the link was free again

    def perform(self, clock: Seconds, stages: npt.NDArray[np.int64], index: npt.NDArray[np.int64]) -> None:
        """Pass ``index`` of each of ``stages``; moves their clocks on."""
        now = clock[stages]
        posted = self.began[stages, np.maximum(0, index - AHEAD)]  # the first ones at 0, or with the first receive
        self.began[stages, index] = now
        start = np.maximum(np.maximum(self.ended[stages + 1 + self.source, index], posted), self.out[stages])
        out = start + self.duration[stages]
        self.out[stages] = out
        now = np.maximum(now, out + self.latency[stages]) + self.compute[stages]
        self.ended[stages + 1, index] = now
        clock[stages] = now


def step_seconds(
    forward: Seconds, backward: Seconds, durations: Seconds, latencies: Seconds, micro_batches: int, extra: int
) -> Seconds:
    """Seconds until the last stage has finished, by scenario, without an update.

    Args:
        forward, backward: [stages, scenarios], of one micro-batch.
        durations, latencies: [stages − 1, scenarios], of the transfers over each boundary, there and back alike.
        micro_batches: of one replica and step.
        extra: ``pipeline.extra_in_flight``.
    """
    stages, scenarios = forward.shape
    none = np.zeros((1, scenarios))
    durations_there, durations_back = np.concatenate([none, durations]), np.concatenate([durations, none])
    latencies_there, latencies_back = np.concatenate([none, latencies]), np.concatenate([latencies, none])
    there = _Pass(-1, durations_there, latencies_there, forward, micro_batches)
    back = _Pass(+1, durations_back, latencies_back, backward, micro_batches)
    clock = np.zeros((stages, scenarios))
    warm_up = np.array([warm_up_micro_batches(micro_batches, stages, stage, extra) for stage in range(stages)])
    every = np.arange(stages)

    for diagonal in range(int((every + warm_up).max()) + 1):
        index = diagonal - every
        _perform(there, clock, every, index, (index >= 0) & (index <= warm_up))
    for diagonal in range(1 - stages, 2 * micro_batches - 1):
        index, is_forward = np.divmod(diagonal + every, 2)  # of forward passes: one less than how many after w
        _perform(back, clock, every, index, (is_forward == 0) & (index >= 0) & (index < micro_batches))
        index = warm_up + index + 1
        _perform(there, clock, every, index, (is_forward == 1) & (index > warm_up) & (index < micro_batches))
    result: Seconds = clock.max(0)
    return result


def _perform(
    kind: _Pass,
    clock: Seconds,
    stages: npt.NDArray[np.int64],
    index: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.bool_],
) -> None:
    if chosen.any():
        kind.perform(clock, stages[chosen], index[chosen])
