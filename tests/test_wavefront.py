"""Protects the evaluation by diagonals: its seconds are the simulator's to the last bit, for all scenarios at once."""

from __future__ import annotations

import random

import numpy as np
import pytest
from test_simulate import random_setting

from lime_dist.pipeline.schedules.one_forward_one_backward import OneForwardOneBackward
from lime_dist.pipeline.schedules.stock import StockSchedule
from lime_dist.pipeline.schedules.zero_bubble import ZeroBubble
from lime_dist.plan.simulate import Link, StageTimes, simulate
from lime_dist.plan.wavefront import step_seconds


@pytest.mark.parametrize("scenarios", [1, 3])
def test_equals_the_simulator(scenarios: int) -> None:
    generator = random.Random(scenarios)
    for _ in range(150):
        times, payloads, links, micro_batches = random_setting(generator)
        schedule = OneForwardOneBackward(micro_batches, len(times), generator.randint(0, 3))
        if generator.random() < 0.5:
            deferred = generator.choice([None, 0, 2])
            schedule = ZeroBubble(micro_batches, len(times), schedule.extra_in_flight, deferred)
        cases = [
            (
                [
                    StageTimes(t.forward * generator.random(), t.backward, t.backward * generator.random())
                    for t in times
                ],
                [Link(link.bandwidth, link.latency * generator.random()) for link in links],
            )
            for _ in range(scenarios)
        ]
        shape = (len(links), scenarios)
        seconds = step_seconds(
            schedule,
            np.array([[t.forward for t in each] for each, _ in cases]).T,
            np.array([[t.backward for t in each] for each, _ in cases]).T,
            np.array([[t.weights for t in each] for each, _ in cases]).T,
            np.array([[s / x.bandwidth for s, x in zip(payloads, each, strict=True)] for _, each in cases]).T.reshape(
                shape
            ),
            np.array([[x.latency for x in each] for _, each in cases]).T.reshape(shape),
        )
        assert seconds.tolist() == [simulate(t, payloads, each, schedule).seconds for t, each in cases]


def test_a_schedule_without_diagonals_is_refused() -> None:
    times = np.ones((2, 1))
    with pytest.raises(ValueError, match="the schedule stock has no diagonals"):
        step_seconds(StockSchedule(4, 2), times, times, times, times[:1], times[:1])
