"""Protects the plan: parameters, bytes and memory are those of real engines, its parts add up, its ranking is what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.policies import POLICIES
from support.workers import WorkerGroup

from lime_dist.config.load import make_config
from lime_dist.forecast import Machine, forecast

ROOT = Path(__file__).resolve().parents[1]
FAST_LINKS = Machine(flops=1e12, bandwidth=1e12, latency=0.0)

# -- against real engines -------------------------------------------------------------------------------------------------

Setting = tuple[int, int, dict[str, Any]]
"""Stages, replicas, what differs from `shape`."""
HIDDEN = {"routes": "hidden"}
CHECKPOINTING = {"activation_checkpointing": True}

SETTINGS: dict[str, Setting] = {
    "llama, 2 stages": (2, 1, {"model": {"architecture": "llama"}}),
    "full, 1 stage": (1, 1, {}),
    "full, 3 stages": (3, 1, {}),
    "full, grouped keys, bf16": (2, 1, {"model": {"num_key_value_heads": 2}, "precision": "bf16"}),
    "first_last, bf16 on the wire": (
        2, 1, {"model": {"lime": {"history": POLICIES["first_last"]}}, "pipeline": {"wire_dtype": "bf16"}},
    ),
    "chunked, checkpointed, bf16": (
        3, 1,
        {"model": {"lime": {"history": POLICIES["chunked, two rows"]}}, "parallel": CHECKPOINTING, "precision": "bf16"},
    ),
    "dilated, none extra": (
        3, 1, {"model": {"lime": {"history": POLICIES["dilated"]}}, "pipeline": {"extra_in_flight": 0}},
    ),
    "many micro-batches": (2, 1, {"train": {"global_batch_size": 12, "micro_batch_size": 1}}),
    "hidden, full": (2, 1, {"model": {"lime": HIDDEN}}),
    "hidden, chunked, checkpointed": (
        2, 1, {"model": {"lime": {**HIDDEN, "history": POLICIES["chunked"]}}, "parallel": CHECKPOINTING},
    ),
    "hidden, dynamic": (2, 1, {"model": {"lime": {**HIDDEN, "router": "dynamic"}, "tie_word_embeddings": False}}),
    "hyper": (2, 1, {"model": {"architecture": "hyper"}}),
    "ZeRO 1, 3 replicas": (1, 3, {"parallel": {"zero_stage": 1}}),
    "ZeRO 1, 2 stages × 2 replicas, bf16": (2, 2, {"parallel": {"zero_stage": 1}, "precision": "bf16"}),
    "stock": (2, 1, {"pipeline": {"engine": "stock"}}),
}  # fmt: skip


def shape(stages: int, changes: dict[str, Any]) -> dict[str, Any]:
    """A run whose micro-batches weigh more than its parameters."""
    values: dict[str, Any] = {
        "model": {
            "vocab_size": 400, "hidden_size": 48, "intermediate_size": 120, "num_hidden_layers": 6, "num_attention_heads": 4,
        },
        "data": {"sequence_length": 64},
        "train": {"global_batch_size": 12, "micro_batch_size": 2},
        "parallel": {"pipeline_stages": stages},
    }  # fmt: skip
    return values | {
        key: {**values.get(key, {}), **change} if isinstance(change, dict) else change
        for key, change in changes.items()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_is_what_engines_do(workers: Callable[[int], WorkerGroup], name: str) -> None:
    """By stage: parameters, their memory and bytes over boundaries exactly, the peak of live tensor bytes to 10 %."""
    stages, replicas, changes = SETTINGS[name]
    values = shape(stages, changes)
    planned = forecast(make_config(values, "a test"), FAST_LINKS, stages * replicas)
    measured = workers(stages * replicas).run("support.memory.measure_stage", values=values)
    assert planned.replicas == replicas
    for stage, expected in enumerate(planned.stages):
        found = [result for result in measured if result["stage"] == stage]
        assert {result["parameters"] for result in found} == {expected.parameters}
        assert max(result["static"] for result in found) == expected.memory.weights + expected.memory.optimizer
        assert max(result["peak"] for result in found) == pytest.approx(expected.memory.peak, rel=0.1)
        if values.get("pipeline", {}).get("engine") == "stock":  # which does not count
            continue
        before = planned.stages[stage - 1].boundary_bytes if stage else 0
        sent = {"sent to next": expected.boundary_bytes, "received from next": expected.boundary_bytes}
        sent |= {"sent to previous": before, "received from previous": before}
        for result in found:
            assert result["sent"] == {key: planned.micro_batches * size for key, size in sent.items() if size}
