"""Names ranks that compute more slowly than their equals for some time, such as one with a GPU that throttles.

What counts is a rank's own computation; what it waits for others does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, median_low

from lime_dist.config.schema import Config
from lime_dist.data.documents import attention_length
from lime_dist.model import cost
from lime_dist.train.measurements import Interval


def stage_flops(config: Config, bounds: Sequence[int]) -> list[float]:
    """Model FLOPs per token of each stage, forwards and backwards; ``bounds`` are those of `partition.stage_bounds`."""
    length = attention_length(config.data, config.model.vocab_size)
    layers = [flops.both for flops in cost.layer_flops(config.model, length)]
    parts = [float(sum(layers[begin:end])) for begin, end in pairwise(bounds)]
    parts[-1] += cost.head_flops(config.model).both
    stages = config.parallel.pipeline_stages
    return [sum(parts[stage::stages]) for stage in range(stages)]


def slowness(intervals: Sequence[Interval], flops: Sequence[float]) -> dict[int, float]:
    """Computation time of each rank over the median of its equals, by rank.

    The equals are the ranks of the same stage; of an even number of them, the faster of the two in the middle is the median. With a
    single replica they are the ranks of all stages, and times are divided by the stages' FLOPs.

    Args:
        intervals: of all ranks, in their order.
        flops: of each stage.
    """
    several = len({one.replica for one in intervals}) > 1
    times = {
        rank: one.seconds["computation"] / (1.0 if several else flops[one.stage]) for rank, one in enumerate(intervals)
    }
    groups: dict[int, list[float]] = {}
    for rank, one in enumerate(intervals):
        groups.setdefault(one.stage if several else 0, []).append(times[rank])
    middle = median_low if several else median
    return {
        rank: times[rank] / typical if (typical := middle(groups[one.stage if several else 0])) > 0 else 1.0
        for rank, one in enumerate(intervals)
    }


@dataclass
class _Slow:
    """Since when a rank has been slow, and whether it has been named."""

    since: float
    named: bool = False


class Stragglers:
    """Watches which ranks are slow, on rank 0.

    Args:
        share: a rank is slow if it takes longer than its equals by more than this share.
        seconds: a rank is named once it has been slow for so long.
    """

    def __init__(self, share: float, seconds: float) -> None:
        self._share, self._seconds = share, seconds
        self._slow: dict[int, _Slow] = {}

    def observe(self, ratios: Mapping[int, float], began: float, now: float) -> list[tuple[int, float]]:
        """Take note of an interval; returns the ranks to name now, with the seconds for which each has been slow.

        Args:
            ratios: as `slowness` returns them.
            began, now: beginning and end of the interval, in seconds.
        """
        slow = {rank for rank, ratio in ratios.items() if ratio > 1 + self._share}
        self._slow = {rank: self._slow.get(rank, _Slow(began)) for rank in sorted(slow)}
        named = []
        for rank, state in self._slow.items():
            if not state.named and now - state.since >= self._seconds:
                state.named = True
                named.append((rank, now - state.since))
        return named
