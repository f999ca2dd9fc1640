"""Protects stages with several parts: the order of their passes, and that a pipeline of them computes what one process computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
from model.test_parts import CASES
from pipeline.test_equality import check_equal, documents, settings
from pipeline.test_overlap import INSTRUCTIONS
from support import victims
from support.workers import WorkerGroup

from lime_dist import load_config
from lime_dist.config.load import make_config
from lime_dist.errors import LimeError
from lime_dist.pipeline.boundaries import boundary_name, describe_boundaries, stage_boundaries
from lime_dist.pipeline.partition import stage_bounds
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
    ("static, chunked", 3, 3, 4, {"activation_checkpointing": "selective"}),
    ("dynamic, first_last", 2, 4, 2, {"activation_checkpointing": True}),
    ("dynamic, dilated", 4, 3, 5, {}),
    ("long chunks, hidden", 2, 2, 6, {"activation_checkpointing": True}),
    ("moda", 2, 3, 4, {}),
    ("moda, MLP, chunked", 3, 2, 5, {"activation_checkpointing": True}),
    ("llama", 4, 2, 9, {"activation_checkpointing": [True, "selective", False, "selective"]}),
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


@pytest.mark.parametrize(("precision", "wire"), [("fp64", None), ("fp32", "bf16")])
def test_replicas_and_documents(workers: Callable[[int], WorkerGroup], precision: str, wire: str | None) -> None:
    """Two stages of two parts and two replicas with ZeRO 1; documents that do not see each other; payloads in a narrower type."""
    values = documents(parts_of("kv, first_last", 2, 2, 8, zero_stage=1))
    values["precision"], values["pipeline"]["wire_dtype"] = precision, wire
    check_equal(values, workers(4), steps=2, evaluation=1, as_precise_as="bf16" if wire else "")


# -- the plan -------------------------------------------------------------------------------------------------------------

PLANNED: list[tuple[str, int, int, dict[str, Any]]] = [
    ("llama", 2, 2, {}),
    ("kv, full", 2, 3, {}),
    ("kv, chunked", 3, 2, {"activation_checkpointing": [True, "selective", False]}),
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


# -- bytes and messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [None, "fp8"])
def test_bytes_are_those_of_the_formula(workers: Callable[[int], WorkerGroup], wire: str | None) -> None:
    """Every stage counts what it sends from each of its parts: what `stage_boundaries` says of the boundary behind it."""
    values = parts_of("kv, chunked", 3, 2, 4)
    values["pipeline"]["wire_dtype"] = wire
    boundaries = [boundary.nbytes for boundary in stage_boundaries(make_config(values, "a test"))]
    for stage, counted in enumerate(workers(3).run("support.transfers.count_bytes_of_parts", values=values)):
        for turn in range(2):
            part = turn * 3 + stage
            before, behind = [0, *boundaries][part], [*boundaries, 0][part]
            expected = {"sent to next": behind, "received from next": behind}
            expected |= {"sent to previous": before, "received from previous": before}
            assert {name: of_parts.get(turn, 0) for name, of_parts in counted.items()} == {
                name: 4 * size for name, size in expected.items()
            }


def test_an_entry_of_the_history_is_kept_once(workers: Callable[[int], WorkerGroup]) -> None:
    """With the full history a stage ends up with every entry up to its last part, in one buffer."""
    values = parts_of("kv, full", 3, 3, 2)
    bounds = stage_bounds(make_config(values, "a test"))
    for stage, positions in enumerate(workers(3).run("support.transfers.positions_of_histories", values=values)):
        assert positions == bounds[7 + stage]


def test_lines_about_boundaries_name_parts() -> None:
    config = make_config(parts_of("llama", 2, 2, 4), "a test")
    assert describe_boundaries(config)[0].startswith("from each part to the next, 0 to 3: ")
    assert boundary_name(config, 1) == "part 1 to 2 (stage 1 to 0)"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["parallel.virtual_stages=2"],
            "parallel.virtual_stages=2 does not work with pipeline.schedule=1f1b, whose stages hold one part each; set "
            "pipeline.schedule=interleaved, or parallel.virtual_stages=1",
        ),
        (
            ["parallel.virtual_stages=9", "pipeline.schedule=interleaved"],
            "parallel.pipeline_stages=2 × parallel.virtual_stages=9 is more than model.num_hidden_layers=16; every part needs a layer",
        ),
        (
            ["parallel.virtual_stages=2", "pipeline.schedule=interleaved", "parallel.stage_layers=[8,8]"],
            "parallel.stage_layers=[8, 8] must be 4 positive numbers (parallel.pipeline_stages × parallel.virtual_stages) whose sum is 16",
        ),
    ],
)
def test_impossible_settings_are_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(LimeError) as caught:
        load_config(None, ["parallel.pipeline_stages=2", *overrides])
    assert line in str(caught.value) and "\n" not in str(caught.value)


GONE_TIMEOUT = 6.0


@pytest.mark.slow
def test_a_peer_that_is_gone_is_named(tmp_path: Path) -> None:
    """A stage is killed or stopped in the middle of a step, at each kind of instruction, also at transfers over the link from the last stage
    to the first: the other one ends within the time-out and says at which instruction, in which part, and who the peer is. (Every kind
    with both harms: test_overlap.py.)"""
    cases = {}
    for instruction, harm in zip(INSTRUCTIONS, cycle(victims.HARMS), strict=False):
        values = parts_of("kv, full", 2, 2, 3)
        values["pipeline"]["timeout"] = GONE_TIMEOUT
        folder = tmp_path / instruction
        folder.mkdir()
        cases[instruction] = victims.Case(values, 0, instruction, victims.HARMS[harm], folder)
    victims.run(list(cases.values()))
    for instruction, case in cases.items():
        case.check_harmed()
        (survivor,) = case.survivors.values()
        assert survivor.status == 1 and survivor.seconds < GONE_TIMEOUT + 5, survivor
        (line,) = [line for line in survivor.said.splitlines() if line.startswith("error: ")]
        where = r".* of micro-batch \d in part [13] (from|to) stage 0 \(rank 0\), step 2"
        if instruction in ("ReduceGrads", "OptimizerStep"):
            where = ".* step 2"
        assert re.match(rf"error: stage 1 \(rank 1\), {where}", line), line
