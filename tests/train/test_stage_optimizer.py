"""Tests of the stage optimizer: learning rates, skipped updates, and replicas that own no parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.workers import WorkerGroup

from lime_dist.config.registry import LEARNING_RATES
from lime_dist.config.schema import OptimizerConfig
from lime_dist.train.learning_rates.cosine import Cosine
from lime_dist.train.learning_rates.wsd import WarmupStableDecay


def test_cosine_schedule() -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=1e-5, warmup_steps=10)
    schedule = Cosine(config, 110)
    factors = [schedule.factor(step) for step in range(120)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == 1.0
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[60] == pytest.approx(0.01 + 0.99 / 2)
    assert factors[110] == factors[119] == pytest.approx(0.01)
    long_warmup = Cosine(OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=1000), 2000)
    assert min(map(long_warmup.factor, range(2000))) == 0.1


def test_linear_and_constant_schedules() -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=10)
    linear, constant = (LEARNING_RATES[name](config, 110) for name in ("linear", "constant"))
    steps = (0, 9, 10, 60, 110, 200)
    assert [linear.factor(step) for step in steps] == pytest.approx([0.1, 1, 1, 0.55, 0.1, 0.1])
    assert [constant.factor(step) for step in steps] == [0.1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("form", "middle", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("sqrt", 1 - 0.5**0.5, 0.0)]
)
def test_warmup_stable_decay(form: str, middle: float, end: float) -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=0.0, warmup_steps=10, decay_share=0.4, decay_form=form)  # type: ignore[arg-type]  # a Literal
    schedule = WarmupStableDecay(config, 100)
    assert [schedule.factor(step) for step in (0, 9, 10, 60)] == [0.1, 1, 1, 1]
    assert schedule.factor(61) < 1
    assert [schedule.factor(step) for step in (80, 100, 500)] == pytest.approx([middle, end, end])
    decay = [schedule.factor(step) for step in range(60, 101)]
    assert all(a > b for a, b in zip(decay, decay[1:], strict=False))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.95, 1.0])
@pytest.mark.parametrize("warmup", [0, 10, 100])
def test_the_decay_has_its_share_of_the_steps_that_the_warm_up_leaves(share: float, warmup: int) -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=warmup, decay_share=share, decay_form="linear")
    factors = [WarmupStableDecay(config, 100).factor(step) for step in range(101)]
    assert sum(1 for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False) if b < a) == min(
        round(100 * share), 100 - warmup
    )
    assert min(factors) >= 0.1


def test_a_stable_run_with_more_steps_goes_on_without_a_jump() -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=1e-5, warmup_steps=10)
    short, long = WarmupStableDecay(config, 100), WarmupStableDecay(config, 1000)
    assert [short.factor(step) for step in range(81)] == [long.factor(step) for step in range(81)]
    assert short.factor(81) < long.factor(81) == 1.0


@pytest.mark.parametrize(("zero_stage", "schedule"), [(0, "1f1b"), (1, "1f1b"), (1, "zero_bubble")])
def test_all_ranks_skip_an_update_with_a_non_finite_gradient(
    workers: Callable[[int], WorkerGroup], zero_stage: int, schedule: str
) -> None:
    group = workers(4)
    results = group.run("support.faults.poisoned_step", zero_stage=zero_stage, schedule=schedule)
    for result in results:
        assert result == {"applied": [True, False, True], "unchanged": True, "moved": True, "skipped": 1, "updates": 2}


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_replica_that_owns_nothing_trains_along(workers: Callable[[int], WorkerGroup], zero_stage: int) -> None:
    group = workers(4)
    for weights in group.run("support.faults.one_tensor_over_four_replicas", zero_stage=zero_stage):
        assert weights == pytest.approx([0.9] * 3, abs=1e-3), "one step of AdamW with lr 0.1 on a positive gradient"
