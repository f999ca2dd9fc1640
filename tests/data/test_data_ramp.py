"""Tests of growing batches: sizes are a function of consumed samples, and every sample comes once, after any resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lime_dist.config.deepspeed import batch_split
from lime_dist.config.load import make_config
from lime_dist.config.schema import BatchRampConfig
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.loader import TrainBatches
from lime_dist.data.order import SampleOrder
from lime_dist.data.ramp import BatchSizes
from lime_dist.errors import LimeError

SIZES = BatchSizes(16, BatchRampConfig(start=4, increment=4, samples=36))


def test_sizes_grow_in_equal_intervals_and_then_stay() -> None:
    assert [SIZES.at(consumed) for consumed in (0, 11, 12, 23, 24, 35, 36, 10**9)] == [4, 4, 8, 8, 12, 12, 16, 16]
    assert [SIZES.consumed_after(steps) for steps in range(9)] == [0, 4, 8, 12, 20, 28, 40, 56, 72]
    assert (BatchSizes(16).at(0), BatchSizes(16).consumed_after(5)) == (16, 80)


def test_a_growing_stream_resumes_at_any_step_and_width(make_dataset: Callable[..., Path]) -> None:
    split = TokenSplit(make_dataset(train=[[np.arange(801)]]), "train")
    order = SampleOrder(3, split.num_samples(8))

    def steps(consumed: int, count: int, micro: int, width: int) -> list[list[int]]:
        streams = [TrainBatches(split, order, 8, SIZES, micro, rank, width, consumed) for rank in range(width)]
        steps_read = []
        for _ in range(count):
            steps_read.append(sorted(int(t) for s in streams for _ in range(s.micro_batches) for t in next(s)[0][:, 0]))
        assert len({stream.consumed_samples for stream in streams}) == 1
        for stream in streams:
            stream.close()
        return steps_read

    straight = steps(0, 9, 1, 1)
    assert [len(step) for step in straight] == [4, 4, 4, 8, 8, 12, 16, 16, 16]
    assert steps(0, 4, 2, 2) + steps(20, 2, 1, 4) + steps(40, 3, 4, 1) == straight
    assert sorted(sum(straight, [])) == sorted(8 * int(i) for i in order.samples_at(np.arange(88)))


def test_a_ramp_that_misses_its_end_or_does_not_divide_is_refused() -> None:
    def config(**ramp: int) -> object:
        values = {"global_batch_size": 16, "micro_batch_size": 2, "batch_ramp": {"samples": 100, **ramp}}
        return make_config({"train": values}, "a test")

    for ramp in ({"start": 16, "increment": 4}, {"start": 4, "increment": 5}):
        with pytest.raises(LimeError, match="the batch does not reach train.global_batch_size=16"):
            config(**ramp)
    with pytest.raises(LimeError, match="greater than or equal to 1"):
        config(start=4, increment=0)
    with pytest.raises(LimeError, match=r"train.batch_ramp.start=4 is not .* × 4 data-parallel replicas = 8 must"):
        batch_split(config(start=4, increment=4), 4)
