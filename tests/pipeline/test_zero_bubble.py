"""Protects backward passes in two parts: the same gradients, in an order that does not depend on when they are computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pipeline.test_equality import MODELS, check_equal, settings
from support.workers import WorkerGroup

CASES = [
    (model, 1 + (index + turn) % 4, (index + turn) % 3, turn) for index, model in enumerate(MODELS) for turn in (0, 2)
]
"""Model, stages, extra micro-batches in flight, and weight passes that every stage holds back."""


@pytest.mark.parametrize(("model", "stages", "extra", "deferred"), CASES)
def test_every_model(workers: Callable[[int], WorkerGroup], model: str, stages: int, extra: int, deferred: int) -> None:
    """With the usual number of weight passes held back, then with a given one; one of them with activation checkpointing."""
    values = settings(model, 4, stages % 2 == 0, "fp64", pipeline_stages=stages, activation_checkpointing=extra == 1)
    values["pipeline"] = {"schedule": "zero_bubble", "extra_in_flight": extra}
    if deferred:
        values["pipeline"]["deferred_weight_passes"] = deferred
    check_equal(values, workers(stages), steps=3)
