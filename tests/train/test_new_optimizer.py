"""Protects that an optimizer and a learning-rate schedule are one object each: two toys, and Muon, go through training, checkpoints
and plan.

The toy optimizer works on whole matrices, so that no part of the trainer can treat a stage as one flat tensor. Matrices have a
momentum that is scaled by its norm; all other parameters use plain gradient descent without state.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import numbers, values
from support.workers import WorkerGroup
from torch import Tensor

from lime_dist.config.load import load_config, make_config
from lime_dist.config.registry import LEARNING_RATES, OPTIMIZERS
from lime_dist.config.schema import OptimizerConfig
from lime_dist.errors import LimeError
from lime_dist.model.architecture import Group
from lime_dist.pipeline.optimizer_memory import parameter_bytes
from lime_dist.plan.forecast import Machine, forecast
from lime_dist.train.learning_rates.base import LearningRate
from lime_dist.train.optimizers.base import Optimizer, ParameterGroup, assign

Workers = Callable[[int], WorkerGroup]


class ScaledMomentum(Optimizer):
    """Matrices: W ← W − lr·M/‖M‖ with M ← β·M + G; other parameters: W ← W − lr·G."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._beta = config.betas[0]

    def states(self, name: str, group: Group) -> tuple[str, ...]:
        return ("momentum",) if group == "matrices" else ()

    def update(self, groups: Sequence[ParameterGroup], step: int, skip: Tensor) -> None:
        for group in groups:
            if not group.states:
                assign(group.weight, group.weight - group.lr * group.gradient, skip)
                continue
            assign(group.states["momentum"], self._beta * group.states["momentum"] + group.gradient, skip)
            for name, span in group.spans.items():
                assert len(span.shape) == 2
                weight, momentum = group.view(group.weight, name), group.view(group.states["momentum"], name)
                assign(weight, weight - group.lr * momentum / momentum.norm(), skip)


class Straight(LearningRate):
    """A straight line from ``lr`` to ``min_lr``."""

    def decay(self, step: int, steps: int) -> float:
        return max(0.0, 1 - step / max(1, steps))


@contextmanager
def registered() -> Iterator[None]:
    """Within, the two are registered in this process."""
    OPTIMIZERS.register("scaled_momentum")(ScaledMomentum)
    LEARNING_RATES.register("straight")(Straight)
    try:
        yield
    finally:
        OPTIMIZERS.unregister("scaled_momentum")
        LEARNING_RATES.unregister("straight")


def call_registered(case: str, **arguments: Any) -> Any:
    """Worker case: call ``module.function`` while the two are registered."""
    module, _, name = case.rpartition(".")
    with registered():
        return getattr(import_module(module), name)(**arguments)


def run(group: WorkerGroup, case: str, **arguments: Any) -> list[Any]:
    return group.run("train.test_new_optimizer.call_registered", case=case, **arguments)


NEW: dict[str, Any] = {"name": "scaled_momentum", "schedule": "straight", "lr": 0.01, "router_lr": 0.1}
OPTIMIZERS_TO_TRY = [NEW, {**NEW, "name": "muon"}]
by_name = pytest.mark.parametrize("optimizer", OPTIMIZERS_TO_TRY, ids=lambda optimizer: optimizer["name"])


def settings(optimizer: dict[str, Any] = NEW, **parallel: Any) -> dict[str, Any]:
    """A tied model of five layers, 4 micro-batches, and clipping in every step."""
    return {
        "model": {
            "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        "data": {"sequence_length": 7},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": 10},
        "optimizer": {**optimizer, "warmup_steps": 2, "max_grad_norm": 0.05},
        "parallel": parallel,
        "precision": "fp64",
    }  # fmt: skip


@by_name
def test_two_stages_of_two_replicas_equal_one_process(workers: Workers, optimizer: dict[str, Any]) -> None:
    """With ZeRO 1, each replica updates whole matrices of its own."""
    (expected,) = run(workers(1), "support.cases.train_steps", values=settings(optimizer), steps=5)
    parallel = settings(optimizer, pipeline_stages=2, zero_stage=1)
    names = set()
    for result in run(workers(4), "support.cases.train_steps", values=parallel, steps=5):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-11)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-10)
        for kind in ("parameters", "updates"):
            for name, tensor in result[kind].items():
                wanted = expected[kind][name]
                assert (tensor - wanted).abs().max() <= 1e-10 * wanted.abs().max(), (kind, name)
        names |= set(result["updates"])
    assert names == set(expected["updates"])
    assert expected["losses"][-1] < expected["losses"][0]
    rates = [lr for lr, _ in expected["rates"]]
    assert rates[:3] == [0.005, 0.01, 0.01] and rates[4] == pytest.approx(1e-6 + (0.01 - 1e-6) * 6 / 8)


@pytest.mark.parametrize("zero_stage", [0, 1])
@by_name
def test_a_gradient_that_is_not_finite_changes_nothing(
    workers: Workers, zero_stage: int, optimizer: dict[str, Any]
) -> None:
    for result in run(workers(4), "support.faults.poisoned_step", zero_stage=zero_stage, optimizer=optimizer):
        assert result == {"applied": [True, False, True], "unchanged": True, "moved": True, "skipped": 1, "updates": 2}


@by_name
def test_a_checkpoint_holds_its_states_and_loads_on_other_layouts(
    workers: Workers, dataset: Path, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    def optimized(directory: Path, **parallel: Any) -> dict[str, Any]:
        run_values = values(dataset, directory, 8, **parallel)
        run_values["train"] |= {"checkpoint_interval": 4, "evaluation_samples": 0, "global_batch_size": 8}
        return {**run_values, "optimizer": {"warmup_steps": 3, **optimizer}}

    straight = tmp_path / "straight"
    assert set(run(workers(4), "support.runs.run", values=optimized(straight, pipeline_stages=2, zero_stage=1))) == {""}
    keys = {
        key: {name for name, states in torch.load(file, weights_only=True).items() if key in states}
        for file in (straight / "checkpoints/global_step8").glob("stage001*.pt")
        for key in ("weight", "momentum", "exp_avg")
    }
    assert keys["momentum"] and keys["momentum"] < keys["weight"]
    assert keys["exp_avg"] == (set() if optimizer is NEW else keys["weight"] - keys["momentum"])
    assert all(name.endswith("_proj.weight") for name in keys["momentum"])

    for stages in (1, 3):
        stopped = tmp_path / f"stopped {stages}"
        shutil.copytree(straight, stopped)
        shutil.rmtree(stopped / "checkpoints/global_step8")
        other = optimized(stopped, pipeline_stages=stages)
        assert set(run(workers(stages), "support.runs.run", values=other)) == {""}
        for record, wanted in zip(numbers(stopped), numbers(straight), strict=True):
            assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-5 if record["step"] == 5 else 1e-4)
            assert record["lr"] == wanted["lr"]

    other = optimized(straight)
    del other["optimizer"]["name"]
    (line,) = run(workers(1), "support.runs.run", values=other)
    assert f"is of another run (optimizer.name: {optimizer['name']} there, adamw here)" in line


def test_a_plan_counts_its_states(workers: Workers) -> None:
    """Exactly, for a replica that owns matrices and other parameters; by hand: 4 bytes for each of weight, gradient and momentum, and
    every parameter fills a multiple of 128 bytes."""
    sizes = {"model.layers.0.mlp.up_proj.weight": 64, "model.norm.weight": 5}
    run_values = {**settings(pipeline_stages=2, zero_stage=1), "precision": "fp32"}
    with registered():
        config = make_config(run_values, "a test")
        assert parameter_bytes(config, sizes) == 64 * 12 + 32 * 8
        planned = forecast(config, Machine(1e12, 1e18, 1e12, 0.0), 4)
    assert parameter_bytes(load_config(None), sizes) == (64 + 32) * 16, "AdamW has two states"
    measured = run(workers(4), "support.memory.measure_stage", values=run_values)
    for stage, expected in enumerate(planned.stages):
        static = max(result["static"] for result in measured if result["stage"] == stage)
        assert static == expected.memory.weights + expected.memory.optimizer


def test_a_name_that_nobody_registered() -> None:
    with pytest.raises(LimeError, match="optimizer.name='scaled_momentum' must be 'adamw' or 'muon'"):
        load_config(None, ["optimizer.name=scaled_momentum"])
    with pytest.raises(
        LimeError, match="optimizer.schedule='straight' must be 'constant', 'cosine', 'linear' or 'wsd'"
    ):
        load_config(None, ["optimizer.schedule=straight"])


def test_an_optimizer_that_lacks_a_member_is_refused() -> None:
    class Half(Optimizer):
        def __init__(self, config: OptimizerConfig) -> None: ...

        def states(self, name: str, group: Group) -> tuple[str, ...]:
            return ()

    with pytest.raises(TypeError, match="optimizer.name: 'half' lacks update"):
        OPTIMIZERS.register("half")(Half)
