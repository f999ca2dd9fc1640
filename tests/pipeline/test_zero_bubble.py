"""Protects backward passes in two parts: the same gradients, whenever weight gradients are computed, and the time that it saves."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.test_equality import CUTS, MODELS, ROUTES, check_equal, policy_settings, settings
from support.folders import numbers, values, weights
from support.policies import POLICIES
from support.workers import WorkerGroup

from lime_dist import build_decoder, load_config
from lime_dist.config.schema import Checkpointing
from lime_dist.errors import LimeError
from lime_dist.model.history import LayerHistory
from lime_dist.model.weight_gradients import Projection, WeightGradients, deferring

Workers = Callable[[int], WorkerGroup]

# -- against one process --------------------------------------------------------------------------------------------------

HELD_BACK = [None, 0, 3]
MODEL_CASES = [
    (
        model,
        1 + (index + 1) % 4,
        index % 3,
        HELD_BACK[index // 2 % 3],
        (False, True, "selective")[(index + index // 3) % 3],
    )
    for index, model in enumerate(MODELS)
]
"""Model, stages, extra micro-batches in flight, weight passes held back, activation checkpointing."""


def zero_bubble(extra: int, held_back: int | None) -> dict[str, Any]:
    return {"schedule": "zero_bubble", "extra_in_flight": extra, "deferred_weight_passes": held_back}


@pytest.mark.parametrize(("model", "stages", "extra", "held_back", "checkpointing"), MODEL_CASES)
def test_every_model(
    workers: Workers, model: str, stages: int, extra: int, held_back: int | None, checkpointing: Checkpointing
) -> None:
    values = settings(model, 4, stages % 2 == 0, "fp64", pipeline_stages=stages, activation_checkpointing=checkpointing)
    values["pipeline"] = zero_bubble(extra, held_back)
    check_equal(values, workers(stages), steps=3)


POLICY_CASES = [
    (policy, list(ROUTES)[p % 3], 2 + p % 3, HELD_BACK[p % 3], ("minimal", "entries")[p % 2])
    for p, policy in enumerate(POLICIES)
]
"""Policy, routes, stages, weight passes held back, boundary. Extra micro-batches and activation checkpointing alternate as well."""


@pytest.mark.parametrize(("policy", "routes", "stages", "held_back", "boundary"), POLICY_CASES)
def test_every_policy(
    workers: Workers, policy: str, routes: str, stages: int, held_back: int | None, boundary: str
) -> None:
    values = policy_settings(
        routes, policy, "fp64",
        pipeline_stages=stages, stage_layers=CUTS[stages], activation_checkpointing=boundary == "minimal",
    )  # fmt: skip
    values["pipeline"] = {**zero_bubble(int(boundary == "entries"), held_back), "boundary": boundary}
    check_equal(values, workers(stages), steps=2)


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_few_micro_batches(workers: Workers, micro_batches: int) -> None:
    """Fewer than stages, and fewer than weight passes to hold back."""
    values = policy_settings("kv", "chunked", "fp64", pipeline_stages=3, stage_layers=CUTS[3])
    values["train"] = {**values["train"], "global_batch_size": micro_batches}
    values["pipeline"] = zero_bubble(1, None)
    check_equal(values, workers(3), steps=2, evaluation=1)


@pytest.mark.parametrize(("precision", "tied"), [("bf16", True), ("fp32", False)])
def test_two_replicas_in_low_precision(workers: Workers, precision: str, tied: bool) -> None:
    """bf16 accumulates in float32, directly from the products."""
    values = settings("lime", 2, tied, precision, pipeline_stages=2, zero_stage=1, activation_checkpointing=tied)
    values["pipeline"] = zero_bubble(1, None) | {"wire_dtype": "bf16" if precision == "bf16" else None}
    check_equal(values, workers(4), steps=3)


# -- whenever it happens --------------------------------------------------------------------------------------------------


def train_and_count(values: dict[str, Any], steps: int, longest: float, fills_waits: bool) -> tuple[list[Any], int]:
    """Worker case: losses, and checksums of all gradients, of steps whose transfers are up to ``longest`` seconds late; and how
    many weight gradients were computed while the stage waited."""
    from support.transfers import train_with_delays

    from lime_dist.pipeline.overlap import OverlapEngine
    from lime_dist.train.stage_optimizer import StageOptimizer

    go_on, step = OverlapEngine._go_on_with_weights, StageOptimizer.step
    gradients: list[str] = []
    computed = 0

    def counting(engine: Any) -> bool:
        nonlocal computed
        done = fills_waits and go_on(engine)
        computed += done
        return done

    def noting(optimizer: Any) -> Any:
        gradients.append(sha256(optimizer.flat_gradients.numpy()).hexdigest())
        return step(optimizer)

    OverlapEngine._go_on_with_weights, StageOptimizer.step = counting, noting
    try:
        return [*train_with_delays(values, steps, longest), *gradients], computed
    finally:
        OverlapEngine._go_on_with_weights, StageOptimizer.step = go_on, step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_time_of_weight_passes_changes_nothing(workers: Workers, precision: str) -> None:
    """In the order of the schedule, or while a stage waits for transfers that are late at random: the same gradients to the last bit.
    Every weight's gradient is summed from the oldest micro-batch to the newest."""
    values = policy_settings("kv", "chunked", precision, pipeline_stages=3, stage_layers=CUTS[3])
    values["pipeline"] = zero_bubble(0, 2)
    group, case = workers(3), "pipeline.test_zero_bubble.train_and_count"
    in_order = group.run(case, values=values, steps=5, longest=0.0, fills_waits=False)
    late = group.run(case, values=values, steps=5, longest=0.002, fills_waits=True)
    assert [said for said, _ in late] == [said for said, _ in in_order]
    assert [computed for _, computed in in_order] == [0, 0, 0]
    assert all(computed > 0 for _, computed in late)


def test_a_resumed_run_is_the_same(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """20 steps without a stop equal 10 + 10 in every record, weight and optimizer state."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"

    def run(directory: Path) -> None:
        settings = values(dataset, directory, pipeline_stages=2) | {"pipeline": zero_bubble(1, None)}
        assert set(workers(2).run("support.runs.run", values=settings)) == {""}

    run(straight)
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints/global_step20")
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 10))
    run(stopped)
    assert numbers(stopped) == numbers(straight)
    resumed, wanted = weights(stopped, 20), weights(straight, 20)
    assert set(resumed) == set(wanted) and all(torch.equal(resumed[name], wanted[name]) for name in wanted)


# -- projections ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_backward_leaves_the_weights_of_projections(checkpointing: Checkpointing) -> None:
    """And nothing else. What is left frees what it was made from, one after the other, and holds no part of the graph."""
    model = build_decoder(load_config(None, SIZE).model, dtype=torch.float64, activation_checkpointing=checkpointing)
    tokens = torch.arange(10).view(2, 5)
    model(tokens).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    left = WeightGradients()
    gc.collect()
    before = histories()
    with deferring(left):
        logits = model(tokens)
    logits.square().sum().backward()
    del logits
    gc.collect()
    assert histories() == before, "the graph holds the history"
    projections = {module.weight for module in model.modules() if isinstance(module, Projection)}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == {
        name for name, parameter in model.named_parameters() if parameter in projections
    }
    assert len(left) == len(projections) == 7 * 3
    for weight in projections:
        weight.grad = torch.zeros_like(weight)
    last = weakref.ref(left._products[-1].gradient_NC)
    while left:
        left.compute_next(lambda weight: weight.grad)
    assert last() is None
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-14)


def histories() -> int:
    """The number of layer histories that are alive, also those of earlier tests."""
    return sum(issubclass(type(each), LayerHistory) for each in gc.get_objects())


SIZE = ["model.hidden_size=8", "model.intermediate_size=12", "model.num_attention_heads=2", "model.num_hidden_layers=3"]


def test_compilation_is_refused() -> None:
    with pytest.raises(LimeError) as caught:
        load_config(None, ["pipeline.schedule=zero_bubble", "train.compile=true"])
    assert "train.compile=true does not work with pipeline.schedule=zero_bubble" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(LimeError, match="pipeline.deferred_weight_passes"):
        load_config(None, ["pipeline.deferred_weight_passes=-1"])
