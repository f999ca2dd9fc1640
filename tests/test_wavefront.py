"""Protects the fast step: it is the simulator's, to the last bit, for all scenarios that go along in one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from test_simulate import random_setting

from lime_dist.plan.simulate import Link, StageTimes, simulate
from lime_dist.plan.wavefront import step_seconds


@pytest.mark.parametrize("scenarios", [1, 3])
def test_equals_the_simulator(scenarios: int) -> None:
    generator = random.Random(scenarios)
    for _ in range(150):
        times, payloads, links, micro_batches = random_setting(generator)
        extra = generator.randint(0, 3)
        cases = [
            (
                [StageTimes(t.forward * generator.random(), t.backward * generator.random()) for t in times],
                [Link(link.bandwidth, link.latency * generator.random()) for link in links],
            )
            for _ in range(scenarios)
        ]
        shape = (len(links), scenarios)
        found = step_seconds(
            np.array([[t.forward for t in each] for each, _ in cases]).T,
            np.array([[t.backward for t in each] for each, _ in cases]).T,
            np.array([[s / x.bandwidth for s, x in zip(payloads, each, strict=True)] for _, each in cases]).T.reshape(
                shape
            ),
            np.array([[x.latency for x in each] for _, each in cases]).T.reshape(shape),
            micro_batches,
            extra,
        )
        expected = [simulate(t, payloads, each, micro_batches, extra=extra).seconds for t, each in cases]
        assert found.tolist() == expected
