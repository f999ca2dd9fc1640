"""Protects stages with several parts: the order of their passes, and that a pipeline of them computes what one process computes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from model.test_parts import CASES
from pipeline.test_equality import check_equal, settings
from support.workers import WorkerGroup

from lime_dist.config.load import make_config
from lime_dist.pipeline.schedules.interleaved import Interleaved
from lime_dist.pipeline.schedules.one_forward_one_backward import OneForwardOneBackward
from lime_dist.plan.forecast import Machine, forecast
from lime_dist.plan.simulate import Link, StageTimes, simulate

NO_TRANSFERS = Link(float("inf"))

# -- the order of passes --------------------------------------------------------------------------------------------------


def simulated(schedule: Interleaved, seconds: float = 0.0) -> float:
    """Seconds of a step with forward passes of 1 s and backward passes of 2 s through a whole stage, and transfers of ``seconds``."""
    parts = schedule.stages * schedule.parts
    times = [StageTimes(1 / schedule.parts, 2 / schedule.parts)] * parts
    link = Link(1 / seconds) if seconds else NO_TRANSFERS
    return simulate(times, [1] * (parts - 1), link, schedule).seconds


def test_with_one_part_it_is_one_forward_one_backward() -> None:
    for micro_batches, stages, extra in product(range(1, 8), range(1, 5), range(4)):
        usual = OneForwardOneBackward(micro_batches, stages, extra)
        own = Interleaved(micro_batches, stages, extra)
        for stage in range(stages):
            assert list(own.instructions(stage)) == list(usual.instructions(stage))
            assert list(own.evaluation(stage)) == list(usual.evaluation(stage))


def test_the_order_is_that_of_megatron() -> None:
    """Two stages, two parts, four micro-batches: groups of two; the first stage warms up with 2·1 + 2 passes."""
    passes = [
        (each.kind[0], each.micro_batch, each.part)
        for each in Interleaved(4, 2, 1, 2).instructions(0)
        if each.kind.endswith("Pass")
    ]
    assert passes[:12] == [
        ("F", 0, 0), ("F", 1, 0), ("F", 0, 1), ("F", 1, 1),
        ("F", 2, 0), ("B", 0, 1), ("F", 3, 0), ("B", 1, 1), ("F", 2, 1), ("B", 0, 0), ("F", 3, 1), ("B", 1, 0),
    ]  # fmt: skip


def test_every_number_of_micro_batches_is_possible() -> None:
    """No deadlock, every pass once, and what is counted is what the instructions do. From as many micro-batches as stages on, a step
    without transfers takes the least that its bubble allows: (P − 1)/V passes more than the work."""
    for stages, parts, micro_batches, extra in product(range(2, 6), range(1, 5), range(1, 12), (0, 1)):
        if parts > 1 and extra == 0:
            continue
        schedule = Interleaved(micro_batches, stages, extra, parts)
        seconds = simulated(schedule)
        if micro_batches >= stages:
            assert seconds == pytest.approx(3 * (micro_batches + (stages - 1) / parts))
        for stage in range(stages):
            forwards, held, before, by_part = 0, [0] * parts, [], []
            for each in schedule.instructions(stage):
                if each.kind == "BackwardPass":
                    before.append(forwards)
                    by_part.append(list(held))
                    held[each.part] -= 1
                elif each.kind == "ForwardPass":
                    forwards += 1
                    held[each.part] += 1
            assert schedule.forwards_before_backwards(stage).tolist() == before and not any(held)
            assert schedule.held_by_part(stage).T.tolist() == by_part
            assert schedule.micro_batches_in_flight(stage) == max(map(sum, by_part))


@pytest.mark.parametrize(("parts", "idle"), [(1, 0.179), (2, 0.099), (4, 0.052)])
def test_the_bubble_of_eight_stages(parts: int, idle: float) -> None:
    assert 1 - 96 / simulated(Interleaved(32, 8, 1, parts)) == pytest.approx(idle, abs=1e-3)


def test_an_extra_micro_batch_hides_transfers() -> None:
    """Of a quarter of a forward pass through a part: a link is busy for 32 · 2 of them in each direction."""
    with_transfers, without = (simulated(Interleaved(32, 4, parts=2), seconds) for seconds in (0.125, 0.0))
    assert with_transfers < 1.06 * without


def test_the_warm_up_is_that_of_megatron_whatever_the_configuration() -> None:
    one, *others = (list(Interleaved(8, 4, extra, 2).instructions(0)) for extra in range(4))
    assert others == [one] * 3 and Interleaved(8, 4, 0, 2).warm_up(0) == 2 * 3 + 4


# -- equality -------------------------------------------------------------------------------------------------------------


def parts_of(case: str, stages: int, parts: int, micro_batches: int, **parallel: Any) -> dict[str, Any]:
    """A run in float64 with 12 layers, or 16 for 16 parts."""
    routes = CASES[case].get("lime", {}).get("routes")
    values = settings("llama", 4 if routes == "hidden" else 2, micro_batches % 2 == 0, "fp64")
    values["model"] = {**values["model"], **CASES[case], "num_hidden_layers": max(12, stages * parts)}
    values["train"] = {**values["train"], "global_batch_size": micro_batches, "micro_batch_size": 1}
    values["parallel"] = {"pipeline_stages": stages, "virtual_stages": parts, **parallel}
    values["pipeline"] = {"schedule": "interleaved"}
    return values


EQUAL: list[tuple[str, int, int, int, dict[str, Any]]] = [
    ("kv, full", 2, 2, 4, {}),
    ("kv, full", 2, 4, 5, {"activation_checkpointing": True}),
    ("kv, first_last", 3, 4, 7, {}),
    ("kv, last alone", 2, 3, 1, {}),
    ("kv, chunked", 3, 2, 9, {"activation_checkpointing": True}),
    ("kv, chunked, two rows", 4, 2, 8, {"stage_layers": [1, 2, 1, 1, 3, 1, 2, 1]}),
    ("kv, dilated", 4, 4, 6, {}),
    ("static, full", 2, 3, 3, {"stage_layers": [1, 3, 1, 4, 2, 1]}),
    ("static, chunked", 3, 3, 4, {}),
    ("dynamic, first_last", 2, 4, 2, {"activation_checkpointing": True}),
    ("dynamic, dilated", 4, 3, 5, {}),
    ("long chunks, hidden", 2, 2, 6, {"activation_checkpointing": True}),
    ("llama", 4, 2, 9, {}),
    ("llama", 1, 4, 3, {}),
    ("hyper dynamic", 2, 2, 3, {}),
    ("gated residual", 3, 2, 4, {}),
    ("value residual", 3, 3, 5, {}),
    ("value residual, learnable", 2, 4, 8, {"activation_checkpointing": True}),
    ("attention residuals", 2, 3, 4, {"stage_layers": [3, 1, 2, 1, 4, 1]}),
    ("attention residuals, full", 4, 3, 7, {"activation_checkpointing": True}),
]


@pytest.mark.parametrize(("case", "stages", "parts", "micro_batches", "parallel"), EQUAL)
def test_it_equals_one_process(
    workers: Callable[[int], WorkerGroup],
    case: str,
    stages: int,
    parts: int,
    micro_batches: int,
    parallel: dict[str, Any],
) -> None:
    """Loss, validation, gradients, norms, and parameters after two clipped steps."""
    values = parts_of(case, stages, parts, micro_batches, **parallel)
    check_equal(values, workers(stages), steps=2, evaluation=1)


# -- the plan -------------------------------------------------------------------------------------------------------------

PLANNED: list[tuple[str, int, int, dict[str, Any]]] = [
    ("llama", 2, 2, {}),
    ("kv, full", 2, 3, {}),
    ("kv, chunked", 3, 2, {"activation_checkpointing": True}),
    ("static, first_last", 2, 2, {}),
]


@pytest.mark.parametrize(("case", "stages", "parts", "parallel"), PLANNED)
def test_a_plan_is_what_engines_do(
    workers: Callable[[int], WorkerGroup], case: str, stages: int, parts: int, parallel: dict[str, Any]
) -> None:
    """By stage: parameters, their memory and transferred bytes exactly, the peak of live tensor bytes to 6 %."""
    values = parts_of(case, stages, parts, 6, **parallel)
    sizes = {"vocab_size": 400, "hidden_size": 48, "intermediate_size": 120}
    values["model"], values["data"] = {**values["model"], **sizes}, {"sequence_length": 64}
    values["precision"] = "fp32"
    planned = forecast(make_config(values, "a test"), Machine(1e12, 1e18, 1e12, 0.0), stages)
    for result in workers(stages).run("support.memory.measure_stage", values=values):
        expected, before = planned.stages[result["stage"]], planned.stages[result["stage"] - 1]
        assert result["parameters"] == expected.parameters
        assert result["static"] == expected.memory.weights + expected.memory.optimizer
        assert result["sent"] == {
            "sent to next": 6 * expected.boundary_bytes,
            "received from next": 6 * expected.boundary_bytes,
            "sent to previous": 6 * before.boundary_bytes,
            "received from previous": 6 * before.boundary_bytes,
        }
        assert result["peak"] == pytest.approx(expected.memory.peak, rel=0.06)
