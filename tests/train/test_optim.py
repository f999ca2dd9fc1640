"""Protects the schedule, and that a step with a gradient that is not finite changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.workers import WorkerGroup

from lime_dist.config.schema import OptimizerConfig
from lime_dist.train.optim import _assign, _segments, schedule_factor


def test_schedule() -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=1e-5, warmup_steps=10)
    factors = [schedule_factor(config, step, 110) for step in range(120)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == 1.0
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[60] == pytest.approx(0.01 + 0.99 / 2)
    assert factors[110] == factors[119] == pytest.approx(0.01)
    assert (
        min(schedule_factor(OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=1000), s, 2000) for s in range(2000))
        == 0.1
    )


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_gradient_that_is_not_finite_is_skipped_by_all_ranks(
    workers: Callable[[int], WorkerGroup], zero_stage: int
) -> None:
    group = workers(4)
    results = group.run("support.faults.poisoned_step", zero_stage=zero_stage)
    for result in results:
        assert result == {"applied": [True, False, True], "unchanged": True, "moved": True, "skipped": 1, "updates": 2}


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_replica_that_owns_nothing_trains_along(workers: Callable[[int], WorkerGroup], zero_stage: int) -> None:
    group = workers(4)
    for weights in group.run("support.faults.one_tensor_over_four_replicas", zero_stage=zero_stage):
        assert weights == pytest.approx([0.9] * 3, abs=1e-3), "one step of AdamW with lr 0.1 on a positive gradient"


def test_more_replicas_than_tensors() -> None:
    """With ZeRO 1 a replica may own nothing; its segment is empty and everything else stays as it is."""
    parameters = {"model.norm.weight": torch.nn.Parameter(torch.ones(3))}
    places = _assign(parameters, 4, frozenset())
    assert _segments(places, 4) == [(0, 3), (3, 3), (3, 3), (3, 3)]
