"""Protects pipelines of compiled layers: they compute what one process computes without a compiler."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from pipeline.test_equality import check_equal, policy_settings, settings
from support.workers import WorkerGroup

from lime_dist.config.schema import Checkpointing


@pytest.mark.parametrize(
    ("model", "checkpointing"),
    [
        ("llama", "selective"), ("lime", False), ("lime", True), ("hidden dynamic", True), ("hyper static", True),
        ("hyper dynamic", "selective"), ("moda, MLP, chunked", "selective"), ("value residual, learnable", True),
        ("gated residual", False), ("gated residual", "selective"), ("attention residuals", "selective"),
        ("hyper doubly stochastic", "selective"), ("hyper permutations", "selective"),
    ],
)  # fmt: skip
def test_traced_layers(workers: Callable[[int], WorkerGroup], model: str, checkpointing: Checkpointing) -> None:
    """What a compiler gets: each part as one graph, and the graph of its backward pass."""
    check_equal(compiled_settings(model, checkpointing), workers(2), worker="support.cases.train_traced")


@pytest.mark.parametrize("routes", ["kv", "static"])
def test_traced_layers_with_a_chunked_history(workers: Callable[[int], WorkerGroup], routes: str) -> None:
    values = policy_settings(routes, "chunked", "fp64", pipeline_stages=2)
    values["train"] = {**values["train"], "compile": True}
    check_equal(values, workers(2), worker="support.cases.train_traced")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="train.compile needs a C++ compiler")
@pytest.mark.parametrize(("model", "checkpointing"), [("lime", "selective"), ("hidden static", True)])
def test_compiled_layers(workers: Callable[[int], WorkerGroup], model: str, checkpointing: Checkpointing) -> None:
    check_equal(compiled_settings(model, checkpointing), workers(2))


def compiled_settings(model: str, checkpointing: Checkpointing) -> dict[str, Any]:
    values = settings(model, 4, True, "fp64", pipeline_stages=2, activation_checkpointing=checkpointing)
    values["train"] = {**values["train"], "compile": True}
    return values
