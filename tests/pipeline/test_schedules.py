"""Protects that a schedule is one object: a toy schedule of this file goes through plan, simulator, picture and a real run.

The toy is GPipe (arXiv 1811.06965): all forward passes, then all backward passes. Nothing else in the program knows it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pipeline.test_equality import check_equal, policy_settings
from support.workers import WorkerGroup

from lime_dist import load_config
from lime_dist.config.load import dump_config, make_config
from lime_dist.config.registry import SCHEDULES
from lime_dist.errors import LimeError
from lime_dist.pipeline.partition import memory_costs
from lime_dist.pipeline.schedules.base import BACKWARDS, Instruction, Schedule, make_schedule
from lime_dist.pipeline.schedules.interleaved import Interleaved
from lime_dist.pipeline.schedules.one_forward_one_backward import OneForwardOneBackward
from lime_dist.pipeline.schedules.overlapped import OverlappedSchedule
from lime_dist.pipeline.schedules.stock import StockSchedule
from lime_dist.pipeline.schedules.zero_bubble import ZeroBubble
from lime_dist.plan import __main__ as plan
from lime_dist.plan.forecast import Machine, forecast
from lime_dist.plan.simulate import Link, StageTimes, simulate
from lime_dist.plan.stage_times import boundary_bytes, stage_times

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class GPipe(OverlappedSchedule):
    """All forward passes, then all backward passes."""

    name: ClassVar[str] = "gpipe"

    def instructions(self, stage: int) -> Iterator[Instruction]:
        for micro_batch in range(self.micro_batches):
            yield from self.forward(stage, micro_batch)
        for micro_batch in range(self.micro_batches):
            yield from self.backward(stage, micro_batch)
        yield from self.update()


@contextmanager
def registered() -> Iterator[None]:
    """Within, ``pipeline.schedule=gpipe`` is a choice."""
    SCHEDULES.register("gpipe")(GPipe)
    try:
        yield
    finally:
        SCHEDULES.unregister("gpipe")


@pytest.fixture
def gpipe() -> Iterator[None]:
    with registered():
        yield


# -- in worker processes --------------------------------------------------------------------------------------------------


def train_steps(**arguments: Any) -> Any:
    from support import cases

    with registered():
        return cases.train_steps(**arguments)


def measure_stage(values: dict[str, Any]) -> Any:
    from support import memory

    with registered():
        return memory.measure_stage(values)


# -- the toy --------------------------------------------------------------------------------------------------------------


def test_a_new_schedule_is_a_choice(gpipe: None) -> None:
    config = load_config(None, ["pipeline.schedule=gpipe"])
    assert config.pipeline.engine == "overlap" and isinstance(make_schedule(config, 4), GPipe)
    with pytest.raises(
        LimeError, match="pipeline.schedule='other' must be '1f1b', 'gpipe', 'interleaved', 'stock' or 'zero_bubble'"
    ):
        load_config(None, ["pipeline.schedule=other"])


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_it_is_simulated(stages: int) -> None:
    """Without transfers it fills and drains the pipeline once, as 1F1B does; each stage makes all its forward passes first."""
    trace = simulate([StageTimes(1, 2)] * stages, [1] * (stages - 1), Link(float("inf")), GPipe(4, stages))
    assert trace.seconds == (4 + stages - 1) * 3
    for intervals in trace.intervals:
        passes = [x.instruction for x in intervals if x.instruction.endswith("Pass")]
        assert passes == ["ForwardPass"] * 4 + ["BackwardPass"] * 4


SIZE = [
    "model.hidden_size=64", "model.num_hidden_layers=8", "data.sequence_length=32", "train.micro_batch_size=1",
    "train.global_batch_size=12", "parallel.pipeline_stages=3", "parallel.stage_layers=[3,3,2]",
]  # fmt: skip


def test_it_is_planned(gpipe: None) -> None:
    """Every stage holds all micro-batches in flight, and the step takes the simulated seconds."""
    config = load_config(None, [*SIZE, "pipeline.schedule=gpipe", "model.tie_word_embeddings=false"])
    planned = forecast(config, Machine(1e12, 1e18, 1e9, 1e-5), 3)
    assert [stage.memory.in_flight for stage in planned.stages] == [12, 12, 12]
    usual = forecast(load_config(None, SIZE), Machine(1e12, 1e18, 1e9, 1e-5), 3)
    assert [stage.memory.in_flight for stage in usual.stages] == [5, 3, 1]
    trace = simulate(stage_times(config, 1e12), boundary_bytes(config), Link(1e9, 1e-5), make_schedule(config, 12))
    assert planned.seconds == pytest.approx(trace.seconds + planned.parts.reduction)


def test_stages_are_cut_for_it(gpipe: None) -> None:
    """By memory: of two stages the last one holds as many micro-batches as the first."""
    gpipe_costs, usual_costs = (
        memory_costs(load_config(None, ["parallel.pipeline_stages=2", "train.global_batch_size=20", *more]))
        for more in (["pipeline.schedule=gpipe"], [])
    )
    assert gpipe_costs(1)[8, 16] > usual_costs(1)[8, 16] and gpipe_costs(0)[0, 8] > usual_costs(0)[0, 8]


@pytest.mark.parametrize("stages", [2, 3])
def test_its_memory_is_that_of_the_engine(workers: Callable[[int], WorkerGroup], gpipe: None, stages: int) -> None:
    """The peak of live tensor bytes to 5 %, as for the other schedules in tests/test_plan_of_engines.py."""
    values: dict[str, Any] = {
        "model": {
            "vocab_size": 400, "hidden_size": 48, "intermediate_size": 120, "num_hidden_layers": 6, "num_attention_heads": 4,
        },
        "data": {"sequence_length": 64},
        "train": {"global_batch_size": 12, "micro_batch_size": 2},
        "parallel": {"pipeline_stages": stages},
        "pipeline": {"schedule": "gpipe"},
    }  # fmt: skip
    planned = forecast(make_config(values, "a test"), Machine(1e12, 1e18, 1e12, 0.0), stages)
    measured = workers(stages).run("pipeline.test_schedules.measure_stage", values=values)
    for stage, expected in enumerate(planned.stages):
        assert measured[stage]["peak"] == pytest.approx(expected.memory.peak, rel=0.05)


def test_its_timeline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, gpipe: None
) -> None:
    """Drawn by the command; of both passes much colour. The plan's numbers come with it."""
    matplotlib = pytest.importorskip("matplotlib.image")
    picture, config = tmp_path / "timeline.png", str(ROOT / "configs/quickstart.yaml")
    arguments = ["--config", config, "--json", "--timeline", str(picture), "pipeline.schedule=gpipe"]
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    plan.main()
    values = json.loads(capsys.readouterr().out)
    assert {stage["memory"]["in_flight"] for stage in values["stages"]} == {values["micro_batches"]}
    pixels = matplotlib.imread(picture)
    for colour in ((0x44, 0x77, 0xAA), (0x66, 0xAA, 0x77)):
        assert ((pixels[..., :3] * 255).round() == colour).all(-1).mean() > 0.01


@pytest.mark.parametrize("policy", ["full", "chunked"])
@pytest.mark.parametrize("stages", [2, 3])
def test_it_equals_one_process(workers: Callable[[int], WorkerGroup], stages: int, policy: str) -> None:
    values = policy_settings("kv", policy, "fp64", pipeline_stages=stages)
    values["pipeline"] = {"schedule": "gpipe"}
    check_equal(values, workers(stages), worker="pipeline.test_schedules.train_steps")


# -- all schedules --------------------------------------------------------------------------------------------------------


PASSES = {"ForwardPass", "BackwardWeight", *BACKWARDS}


def every_schedule(micro_batches: int, stages: int) -> list[Schedule]:
    return [
        *(OneForwardOneBackward(micro_batches, stages, extra) for extra in (0, 1, 3)),
        *(
            ZeroBubble(micro_batches, stages, extra, deferred)
            for extra, deferred in ((0, None), (1, None), (0, 2), (1, 0))
        ),
        StockSchedule(micro_batches, stages),
        GPipe(micro_batches, stages),
        Interleaved(micro_batches, stages),
    ]


def test_formulas_are_what_the_instructions_do() -> None:
    """Passes are counted by hand, one instruction after the other."""
    for micro_batches in range(1, 9):
        for stages in range(1, 5):
            for schedule in every_schedule(micro_batches, stages):
                for stage in range(stages):
                    kinds = [instruction.kind for instruction in schedule.instructions(stage)]
                    forwards, before, in_flight, most, waiting, held = 0, [], 0, 0, 0, []
                    for kind in kinds:
                        if kind in BACKWARDS:
                            before.append(forwards)
                            held.append(waiting)
                        forwards += kind == "ForwardPass"
                        in_flight += (kind == "ForwardPass") - (kind in BACKWARDS)
                        waiting += (kind == "BackwardInput") - (kind == "BackwardWeight")
                        most = max(most, in_flight)
                    assert waiting == 0 and schedule.weight_passes_held(stage).tolist() == held
                    assert schedule.forwards_before_backwards(stage).tolist() == before
                    assert schedule.warm_up(stage) == before[0] - 1
                    assert schedule.micro_batches_in_flight(stage) == most <= schedule.buffers(stage)


def test_diagonals_have_every_pass_once() -> None:
    for schedule, kinds in ((OneForwardOneBackward(7, 4, 1), 2), (ZeroBubble(7, 4, 1), 3), (ZeroBubble(7, 4, 0, 1), 3)):
        passes = [
            (diagonal.kind, int(stage), int(micro_batch))
            for diagonal in schedule.diagonals()
            for stage, micro_batch in zip(diagonal.stages, diagonal.micro_batches, strict=True)
        ]
        assert len(passes) == len(set(passes)) == kinds * 7 * 4
        for stage in range(4):
            own = [(kind, micro_batch) for kind, at, micro_batch in passes if at == stage]
            assert own == [each[:2] for each in schedule.instructions(stage) if each.kind in PASSES]


def test_stock_buffers_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    for micro_batches, stages in np.ndindex(9, 5):
        for stage in range(stages):
            expected = TrainSchedule(micro_batches + 1, stages, stage).num_pipe_buffers()
            assert StockSchedule(micro_batches + 1, stages).buffers(stage) == expected


def test_names_are_those_of_the_registry() -> None:
    assert (
        list(SCHEDULES)
        == [schedule.name for schedule in SCHEDULES.values()]
        == ["1f1b", "interleaved", "stock", "zero_bubble"]
    )


def test_a_schedule_that_lacks_a_member_is_refused() -> None:
    class Incomplete(OverlappedSchedule):
        """Without instructions."""

    with pytest.raises(TypeError, match="pipeline.schedule: 'incomplete' lacks instructions"):
        SCHEDULES.register("incomplete")(Incomplete)
    assert "incomplete" not in SCHEDULES


# -- the configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "schedule", "engine"),
    [
        ([], "1f1b", "overlap"),
        (["pipeline.extra_in_flight=0"], "1f1b", "overlap"),
        (["pipeline.engine=stock"], "stock", "stock"),
        (["pipeline.schedule=stock"], "stock", "stock"),
        (["pipeline.engine=overlap"], "1f1b", "overlap"),
        (["pipeline.schedule=stock", "pipeline.engine=stock"], "stock", "stock"),
    ],
)
def test_schedule_and_engine_imply_each_other(overrides: list[str], schedule: str, engine: str, tmp_path: Path) -> None:
    """A configuration from before the key existed names the engine only."""
    config = load_config(None, overrides)
    assert (config.pipeline.schedule, config.pipeline.engine) == (schedule, engine)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["pipeline.engine=stock", "pipeline.schedule=1f1b"],
            "pipeline.engine=stock does not run pipeline.schedule=1f1b; set pipeline.engine=overlap, or leave one of the two out",
        ),
        (["pipeline.schedule=5"], "pipeline.schedule=5 in the command line: input should be a valid string"),
        (
            ["pipeline.schedule=fast"],
            "pipeline.schedule='fast' must be '1f1b', 'interleaved', 'stock' or 'zero_bubble'",
        ),
    ],
)
def test_contradictions_are_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(LimeError) as caught:
        load_config(None, overrides)
    assert line in str(caught.value) and "\n" not in str(caught.value)
