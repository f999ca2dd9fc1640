"""Tests of stragglers: a rank is named by its own computation, against its equals, and only if it stays slow."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.folders import values
from support.workers import WorkerGroup
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lime_dist.config.load import load_config
from lime_dist.model import cost
from lime_dist.pipeline.clock import KINDS
from lime_dist.train.measurements import Interval
from lime_dist.train.stragglers import Stragglers, slowness, stage_flops

Workers = Callable[[int], WorkerGroup]
ANY = Interval(
    stage=0, replica=0, steps=1, tokens=1, step_seconds=1.0, seconds=dict.fromkeys(KINDS, 0.0), bytes={}, gradient_norm=0.0,
    memory=0, peak_flops=1.0,
)  # fmt: skip


def measured(stage: int, replica: int, computation: float, waiting: float = 0.0) -> Interval:
    return replace(
        ANY, stage=stage, replica=replica, seconds={**ANY.seconds, "computation": computation, "waiting": waiting}
    )


def test_a_rank_is_compared_with_the_ranks_of_its_stage() -> None:
    """The second stage takes three times as long; its third replica twice as long as its equals. Waiting does not count."""
    intervals = [measured(0, r, 1.0, waiting=9.0 * (r == 1)) for r in range(3)] + [
        measured(1, r, 3.0) for r in range(2)
    ]
    intervals.append(measured(1, 2, 6.0))
    assert slowness(intervals, [1.0, 1.0]) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0}


def test_with_one_replica_stages_are_compared_by_their_flops() -> None:
    intervals = [measured(0, 0, 2.0), measured(1, 0, 2.0), measured(2, 0, 3.0)]
    assert slowness(intervals, [2.0, 1.0, 3.0]) == {0: 1.0, 1: 2.0, 2: 1.0}
    assert slowness([measured(0, 0, 0.0), measured(1, 0, 0.0)], [1.0, 1.0]) == {0: 1.0, 1: 1.0}, (
        "nothing is measured yet"
    )


def test_the_flops_of_all_stages_are_those_of_the_model() -> None:
    config = load_config(None, [])
    layers = cost.layer_flops(config.model, config.data.sequence_length)
    assert sum(stage_flops(config, [0, 3, len(layers)])) == pytest.approx(
        sum(each.both for each in layers) + cost.head_flops(config.model).both
    )


def test_a_stage_has_the_flops_of_its_parts() -> None:
    """With the tokens that attention reads under a document mask."""
    overrides = ["parallel.pipeline_stages=2", "model.num_hidden_layers=8"]
    config = load_config(None, overrides)
    one, two = stage_flops(config, [0, 4, 8]), stage_flops(config, [0, 2, 4, 6, 8])
    assert len(two) == 2 and sum(two) == pytest.approx(sum(one))
    layers = [each.both for each in cost.layer_flops(config.model, config.data.sequence_length)]
    assert two[0] == pytest.approx(sum(layers[0:2] + layers[4:6]))


def test_with_two_replicas_the_slower_is_compared_with_the_faster() -> None:
    """Not with their mean, which is slow itself."""
    assert slowness([measured(0, 0, 1.0), measured(0, 1, 1.5)], [1.0]) == {0: 1.0, 1: 1.5}


def test_a_rank_is_named_once_it_has_been_slow_for_long_and_again_after_it_recovered() -> None:
    watch = Stragglers(share=0.25, seconds=10)
    assert watch.observe({0: 1.0, 1: 1.3}, began=0, now=6) == []
    assert watch.observe({0: 1.0, 1: 1.3}, began=6, now=12) == [(1, 12)]
    assert watch.observe({0: 1.0, 1: 1.3}, began=12, now=18) == []
    assert watch.observe({0: 1.0, 1: 1.2}, began=18, now=24) == []
    assert watch.observe({0: 1.0, 1: 1.3}, began=24, now=33) == []
    assert watch.observe({0: 1.0, 1: 1.3}, began=33, now=36) == [(1, 12)]


def test_a_slow_rank_of_a_run_is_named(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    run = values(dataset, tmp_path, steps=6, pipeline_stages=2)
    run["train"]["log_interval"] = 2
    run["monitor"] = {"straggler_minutes": 0.0, "straggler_share": 4.0}
    error, said = workers(4).run("support.runs.observe_with_a_slow_rank", values=run, slow=2, seconds=0.2)[0]
    assert error == ""
    named = re.findall(
        r"^warning: step (\d): rank (\d), stage (\d), has been slow for .* as the median", said, re.MULTILINE
    )
    assert ("2", "2", "0") in named and {rank for _, rank, _ in named} == {"2"}, "ranks 0 and 2 hold the first stage"
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("speed/slowest_rank")] == [2, 2, 2]
    assert all(event.value > 1.25 for event in board.Scalars("speed/slowest_over_median"))
