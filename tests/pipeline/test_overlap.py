"""Protects the engine that overlaps transfers with computation: its schedule, what it sends, and its hang detection."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support import victims
from support.policies import POLICIES
from support.workers import WorkerGroup

from lime_dist import load_config
from lime_dist.errors import LimeError
from lime_dist.pipeline.schedules.one_forward_one_backward import OneForwardOneBackward
from lime_dist.pipeline.stage_schedule import EvaluationStage, TrainingStage

INSTRUCTIONS = [
    "LoadMicroBatch", "RecvActivation", "ForwardPass", "SendActivation", "RecvGrad", "BackwardPass", "SendGrad", "ReduceGrads", "OptimizerStep",
]  # fmt: skip


SPLIT_INSTRUCTIONS = ["BackwardInput", "BackwardWeight"]


def settings(stages: int, policy: str = "full", precision: str = "fp64", **pipeline: Any) -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 9,
            "num_attention_heads": 4, "num_key_value_heads": 2, "lime": {"history": POLICIES[policy]},
        },
        "data": {"sequence_length": 7},
        "train": {"global_batch_size": 8, "micro_batch_size": 1, "steps": 200},
        "parallel": {"pipeline_stages": stages},
        "pipeline": pipeline,
        "precision": precision,
    }  # fmt: skip


def instructions(schedule: Any) -> list[tuple[str, int]]:
    """(kind, micro-batch) in order; −1 for instructions that concern the whole step."""
    return [(type(each).__name__, each.kwargs.get("buffer_id", -1)) for step in schedule.steps() for each in step]


@pytest.mark.parametrize("extra", [0, 1, 2, 5])
def test_schedules_fit_together(extra: int) -> None:
    """Every micro-batch passes every stage once in each direction, a stage receives in the order in which its neighbour sends,
    and no stage holds more micro-batches than the schedule says."""
    for stages, micro_batches in product(range(1, 6), range(1, 12)):
        schedule = OneForwardOneBackward(micro_batches, stages, extra)
        by_stage = [instructions(TrainingStage(schedule, stage)) for stage in range(stages)]
        for stage, listed in enumerate(by_stage):

            def order(kind: str, listed: list[tuple[str, int]] = listed) -> list[int]:
                return [index for name, index in listed if name == kind]

            everyone = list(range(micro_batches))
            assert order("ForwardPass") == order("BackwardPass") == everyone
            assert order("SendActivation") == order("RecvGrad") == (everyone if stage < stages - 1 else [])
            assert order("RecvActivation") == order("SendGrad") == (everyone if stage else [])
            assert order("LoadMicroBatch") == (everyone if stage in (0, stages - 1) else [])
            in_flight, most = 0, 0
            for name, index in listed:
                in_flight += (name == "ForwardPass") - (name == "BackwardPass")
                most = max(most, in_flight)
                if name == "SendActivation":
                    assert listed[listed.index((name, index)) - 1] == ("ForwardPass", index), "it is sent at once"
            assert most == schedule.micro_batches_in_flight(stage) == schedule.buffers(stage)
        assert all(listed[-2:] == [("ReduceGrads", -1), ("OptimizerStep", -1)] for listed in by_stage)


def test_an_evaluation_has_forward_passes_only() -> None:
    for stage in range(3):
        kinds = {name for name, _ in instructions(EvaluationStage(OneForwardOneBackward(4, 3), stage))}
        assert not kinds & {"BackwardPass", "RecvGrad", "SendGrad", "OptimizerStep"}


@pytest.mark.parametrize(("precision", "wire"), [("bf16", None), ("fp32", "bf16"), ("fp32", "fp8"), ("bf16", "fp8")])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_as_predicted(
    workers: Callable[[int], WorkerGroup], policy: str, stages: int, precision: str, wire: str | None
) -> None:
    values = settings(stages, policy, precision, wire_dtype=wire)
    results = workers(stages).run("support.transfers.count_transferred_bytes", values=values, steps=2)
    assert [len(directions) for directions in results] == [2, *[4] * (stages - 2), 2]
    for directions in results:
        for direction, (counted, predicted) in directions.items():
            assert counted == predicted > 0, direction


def test_a_model_without_history_and_streams_are_counted_too(workers: Callable[[int], WorkerGroup]) -> None:
    for architecture, lime in (
        *((name, {}) for name in ("llama", "hyper", "value_residual", "attention_residuals")),
        ("lime", {"depth_attention": "moda", "mlp_entries": True}),
    ):
        values = settings(2)
        values["model"] = {**values["model"], "architecture": architecture, "num_key_value_heads": 4, "lime": lime}
        for directions in workers(2).run("support.transfers.count_transferred_bytes", values=values, steps=1):
            assert all(counted == predicted > 0 for counted, predicted in directions.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_payload_lands_in_its_history(workers: Callable[[int], WorkerGroup], policy: str) -> None:
    """Received entries are not copied: a payload in another form is decoded into its history."""
    for wire in (None, "bf16", "fp8"):
        values = settings(3, policy, "fp32", wire_dtype=wire)
        assert workers(3).run("support.transfers.copies_of_payloads", values=values) == [0, 0, 0]


def test_transfers_under_way_are_bounded(workers: Callable[[int], WorkerGroup]) -> None:
    """Payloads are freed during the step, not at its end: their number follows from the micro-batches in flight."""
    values = settings(3, extra_in_flight=1)
    values["train"] = {**values["train"], "global_batch_size": 16}
    assert workers(3).run("support.transfers.most_under_way", values=values) == [(6, 0), (4, 4), (0, 4)]


def test_no_step_after_a_failed_one(workers: Callable[[int], WorkerGroup]) -> None:
    (said,) = workers(1).run("support.transfers.step_after_a_failed_step", values=settings(1))
    assert said.startswith("an earlier step ended with an exception")


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "extra"), [(2, 0), (3, 1), (2, 2)])
def test_late_transfers_change_nothing(workers: Callable[[int], WorkerGroup], stages: int, extra: int) -> None:
    """200 steps in which each end of each transfer is up to 1 ms late at random: no deadlock, identical losses to the last bit."""
    values = settings(stages, "chunked", extra_in_flight=extra)
    values["model"]["num_hidden_layers"] = 4
    values["train"] = {**values["train"], "global_batch_size": 4}
    group = workers(stages)
    undisturbed = group.run("support.transfers.train_with_delays", values=values, steps=200, longest=0.0)
    late = group.run("support.transfers.train_with_delays", values=values, steps=200, longest=0.001)
    assert late == undisturbed and len(set(late[0])) > 190


@pytest.mark.parametrize(
    ("schedule", "wire"), [("1f1b", None), ("1f1b", "fp8"), ("zero_bubble", None), ("stock", None)]
)
def test_training_is_not_disturbed_by_evaluations_and_checkpoints(
    workers: Callable[[int], WorkerGroup], tmp_path: Path, schedule: str, wire: str | None
) -> None:
    """Evaluations with two batch sizes and a checkpoint between training steps, on one engine."""
    values = settings(2, "chunked", schedule=schedule, wire_dtype=wire)
    group = workers(4)
    straight = group.run("support.transfers.train_with_interruptions", values=values, folder="")
    interrupted = group.run("support.transfers.train_with_interruptions", values=values, folder=str(tmp_path))
    assert interrupted == straight and (tmp_path / "global_step2" / "manifest.json").exists()


GONE_TIMEOUT = 6.0


@pytest.fixture(scope="module")
def gone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], victims.Case]:
    """The selected cases by instruction and harm, run at the same time as far as possible."""
    cases = {}
    for item in request.session.items:
        if "gone" in item.fixturenames:
            instruction, harm = item.callspec.params["instruction"], item.callspec.params["harm"]
            split = (
                {"schedule": "zero_bubble", "deferred_weight_passes": 0} if instruction in SPLIT_INSTRUCTIONS else {}
            )
            values = settings(3, timeout=GONE_TIMEOUT, **split)
            values["train"] = {**values["train"], "global_batch_size": 3}
            victim, folder = 0 if instruction == "LoadMicroBatch" else 1, tmp_path_factory.mktemp("gone")
            cases[instruction, harm] = victims.Case(values, victim, instruction, victims.HARMS[harm], folder)
    victims.run(list(cases.values()))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("harm", victims.HARMS)
@pytest.mark.parametrize("instruction", [*INSTRUCTIONS, *SPLIT_INSTRUCTIONS])
def test_a_peer_that_is_gone_is_named(gone: dict[tuple[str, str], victims.Case], instruction: str, harm: str) -> None:
    """One of three stages is killed or stopped at each kind of instruction: both others end within the time-out and say at which
    instruction; a stage that waited for a transfer names its peer."""
    case = gone[instruction, harm]
    case.check_harmed()
    victim, survivors = case.victim, case.survivors.values()
    assert len(survivors) == 2
    lines = []
    for survivor in survivors:
        assert survivor.status == 1, survivor
        assert survivor.seconds < GONE_TIMEOUT + 5
        (line,) = [line for line in survivor.said.splitlines() if line.startswith("error: ")]
        assert re.match(r"error: stage (\d) \(rank \1\), .* step 2", line), line
        lines.append(line)
    if instruction not in ("ReduceGrads", "OptimizerStep"):
        assert any(
            re.search(rf"micro-batch \d (from|to) stage {victim} \(rank {victim}\), step 2", line) for line in lines
        ), lines


def test_impossible_values_are_refused() -> None:
    for override, words in (
        ("pipeline.extra_in_flight=-1", "pipeline.extra_in_flight"),
        ("pipeline.timeout=0", "pipeline.timeout"),
        ("pipeline.wire_dtype=fp16", "pipeline.wire_dtype"),
        ("pipeline.engine=fast", "pipeline.engine"),
    ):
        with pytest.raises(LimeError, match=words):
            load_config(None, [override])


def test_the_stock_engine_sends_no_float8() -> None:
    with pytest.raises(LimeError, match=r"pipeline.wire_dtype=fp8 does not work with pipeline.schedule=stock"):
        load_config(None, ["pipeline.engine=stock", "pipeline.wire_dtype=fp8"])
