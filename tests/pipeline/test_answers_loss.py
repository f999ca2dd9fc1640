"""Protects the loss of answers in a pipeline: it equals that of one process on the whole batch, for any stages and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support.workers import WorkerGroup

from benchmarks.equality import random_batch, train_one_process
from lime_dist.config.load import make_config

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5, "bf16": 5e-2}
"""As in test_equality.py."""
STEPS = 2


def settings(micro_batch_size: int, precision: str, engine: str, **parallel: Any) -> dict[str, Any]:
    """A vocabulary of nine tokens, so that a third of the labels count: none in some rows, nearly all in others."""
    return {
        "model": {
            "vocab_size": 9, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        },
        "data": {"sequence_length": 6, "answer_token": 5},
        "train": {"global_batch_size": 8, "micro_batch_size": micro_batch_size, "steps": 10},
        "optimizer": {"warmup_steps": 2, "max_grad_norm": 0.05, "lr": 0.01, "router_lr": 0.1, "eps": 0.01},
        "pipeline": {"engine": engine},
        "parallel": parallel,
        "precision": precision,
    }  # fmt: skip


@cache
def at_once(precision: str) -> dict[str, Any]:
    """Train one process, with the whole batch as one micro-batch."""
    return train_one_process(make_config(settings(8, precision, "overlap"), "a test"), STEPS, 8)


def test_micro_batches_hold_different_shares_of_answers() -> None:
    """Otherwise a mean over counted tokens would be right too."""
    _, labels = random_batch(make_config(settings(1, "fp64", "overlap"), "a test"), 0)
    counts = (labels >= 0).sum(1).tolist()
    assert min(counts) == 0 and max(counts) >= 4


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("engine", ["overlap", "stock"])
@pytest.mark.parametrize(
    ("stages", "processes", "precision"),
    [(1, 1, "fp64"), (2, 2, "fp64"), (3, 3, "fp64"), (2, 2, "fp32"), (2, 2, "bf16"), (2, 4, "fp64")],
)
def test_a_pipeline_equals_one_process_on_the_whole_batch(
    workers: Callable[[int], WorkerGroup],
    stages: int,
    processes: int,
    precision: str,
    engine: str,
    micro_batch_size: int,
) -> None:
    """Loss, validation in micro-batches of another size, and every gradient are equal."""
    values = settings(micro_batch_size, precision, engine, pipeline_stages=stages)
    results = workers(processes).run(
        "support.cases.train_steps", values=values, steps=STEPS, evaluation_micro_batch_size=2
    )
    expected, tolerance = at_once(precision), TOLERANCE[precision]
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        assert result["evaluations"] == pytest.approx(expected["evaluations"], rel=tolerance)
        for name, gradient in result["gradients"].items():
            wanted = expected["gradients"][name].double()
            assert torch.linalg.vector_norm(wanted) > 0
            error = (gradient.double() - wanted).abs().max() / wanted.abs().max()
            assert error <= tolerance, f"{name} on stage {result['stage']}: {error:.1e}"
    assert {name for result in results for name in result["gradients"]} == set(expected["gradients"])
