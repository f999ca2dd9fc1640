"""Protects the plan: parameters, bytes and memory are those of real engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.policies import POLICIES
from support.workers import WorkerGroup

from lime_dist.config.load import make_config
from lime_dist.plan.forecast import Machine, forecast

MACHINE = Machine(flops=1e12, memory_bandwidth=1e18, bandwidth=1e12, latency=0.0)
Setting = tuple[int, int, dict[str, Any]]
"""Stages, replicas, and changes to `shape`."""
HIDDEN = {"routes": "hidden"}
CHECKPOINTING = {"activation_checkpointing": True}
SELECTIVE = {"activation_checkpointing": "selective"}

SETTINGS: dict[str, Setting] = {
    "llama, 2 stages": (2, 1, {"model": {"architecture": "llama"}}),
    "full, 1 stage": (1, 1, {}),
    "full, 3 stages": (3, 1, {}),
    "full, grouped keys, bf16": (2, 1, {"model": {"num_key_value_heads": 2}, "precision": "bf16"}),
    "first_last, bf16 on the wire": (
        2, 1, {"model": {"lime": {"history": POLICIES["first_last"]}}, "pipeline": {"wire_dtype": "bf16"}},
    ),
    "full, float8 on the wire": (
        3, 1, {"model": {"num_key_value_heads": 2}, "precision": "bf16", "pipeline": {"wire_dtype": "fp8"}},
    ),
    "hidden, float8 on the wire": (2, 1, {"model": {"lime": HIDDEN}, "pipeline": {"wire_dtype": "fp8"}}),
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
    "gated residual": (2, 1, {"model": {"architecture": "gated_residual"}}),
    "gated residual, checkpointed, bf16": (
        3, 1, {"model": {"architecture": "gated_residual"}, "parallel": CHECKPOINTING, "precision": "bf16"},
    ),
    "hyper doubly stochastic": (2, 1, {"model": {"architecture": "hyper", "hyper": {"connection": "doubly_stochastic"}}}),
    "hyper permutations, checkpointed, bf16": (
        2, 1, {"model": {"architecture": "hyper", "hyper": {"connection": "permutations"}}, "parallel": CHECKPOINTING,
               "precision": "bf16"},
    ),
    "value residual": (3, 1, {"model": {"architecture": "value_residual"}}),
    "moda": (3, 1, {"model": {"lime": {"depth_attention": "moda"}}}),
    "moda, MLP, zero bubble": (
        2, 1, {"model": {"lime": {"depth_attention": "moda", "mlp_entries": True}},
               "pipeline": {"schedule": "zero_bubble", "deferred_weight_passes": 2}},
    ),
    "moda, MLP, chunked, checkpointed, bf16": (
        2, 1, {"model": {"lime": {"depth_attention": "moda", "mlp_entries": True, "history": POLICIES["chunked"]},
                         "num_key_value_heads": 2}, "parallel": CHECKPOINTING, "precision": "bf16"},
    ),
    "attention residuals": (3, 1, {"model": {"architecture": "attention_residuals"}}),
    # Many tokens: on a CPU a slice of them is read in float32, which the plan of a GPU leaves out.
    "attention residuals, full, checkpointed, bf16": (
        2, 1, {"model": {"architecture": "attention_residuals", "attention_residuals": {"block_size": 1}}, "parallel": CHECKPOINTING,
               "precision": "bf16", "data": {"sequence_length": 512}, "train": {"global_batch_size": 48, "micro_batch_size": 24}},
    ),
    "value residual, checkpointed, bf16": (
        2, 1, {"model": {"architecture": "value_residual", "value_residual": {"learnable": True}, "num_key_value_heads": 2},
               "parallel": CHECKPOINTING, "precision": "bf16"},
    ),
    "zero bubble": (3, 1, {"pipeline": {"schedule": "zero_bubble"}}),
    "zero bubble, checkpointed, bf16": (
        3, 1, {"pipeline": {"schedule": "zero_bubble", "extra_in_flight": 0}, "parallel": CHECKPOINTING, "precision": "bf16"},
    ),
    "zero bubble, hidden, 2 held back": (
        2, 1, {"model": {"lime": HIDDEN}, "pipeline": {"schedule": "zero_bubble", "deferred_weight_passes": 2}},
    ),
    "selective, llama": (2, 1, {"model": {"architecture": "llama"}, "parallel": SELECTIVE}),
    "selective, lime full, bf16": (3, 1, {"parallel": SELECTIVE, "precision": "bf16"}),
    "kept, selective and full": (3, 1, {"parallel": {"activation_checkpointing": [True, "selective", False]}}),
    "selective, hidden": (2, 1, {"model": {"lime": HIDDEN}, "parallel": SELECTIVE}),
    "selective, moda, MLP": (2, 1, {"model": {"lime": {"depth_attention": "moda", "mlp_entries": True}}, "parallel": SELECTIVE}),
    "selective, hyper": (2, 1, {"model": {"architecture": "hyper"}, "parallel": SELECTIVE}),
    "selective, hyper doubly stochastic, bf16": (
        2, 1, {"model": {"architecture": "hyper", "hyper": {"connection": "doubly_stochastic"}}, "parallel": SELECTIVE, "precision": "bf16"},
    ),
    "selective, gated residual": (2, 1, {"model": {"architecture": "gated_residual"}, "parallel": SELECTIVE}),
    "selective, value residual": (2, 1, {"model": {"architecture": "value_residual"}, "parallel": SELECTIVE}),
    "selective, attention residuals, bf16": (
        2, 1, {"model": {"architecture": "attention_residuals"}, "parallel": SELECTIVE, "precision": "bf16"},
    ),
    "selective, zero bubble": (2, 1, {"pipeline": {"schedule": "zero_bubble"}, "parallel": SELECTIVE}),
    "ZeRO 1, 3 replicas": (1, 3, {"parallel": {"zero_stage": 1}}),
    "ZeRO 1, 2 stages × 2 replicas, bf16": (2, 2, {"parallel": {"zero_stage": 1}, "precision": "bf16"}),
    "stock": (2, 1, {"pipeline": {"engine": "stock"}}),
}  # fmt: skip


def shape(stages: int, changes: dict[str, Any]) -> dict[str, Any]:
    """A run whose micro-batches need more memory than its parameters."""
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
    """By stage: parameters, their memory and transferred bytes exactly, the peak of live tensor bytes to 5 %."""
    stages, replicas, changes = SETTINGS[name]
    values = shape(stages, changes)
    planned = forecast(make_config(values, "a test"), MACHINE, stages * replicas)
    measured = workers(stages * replicas).run("support.memory.measure_stage", values=values)
    assert planned.replicas == replicas
    for stage, expected in enumerate(planned.stages):
        replicas_of_stage = [result for result in measured if result["stage"] == stage]
        assert {result["parameters"] for result in replicas_of_stage} == {expected.parameters}
        static = max(result["static"] for result in replicas_of_stage)
        assert static == expected.memory.weights + expected.memory.optimizer
        assert max(result["peak"] for result in replicas_of_stage) == pytest.approx(expected.memory.peak, rel=0.05)
        if values.get("pipeline", {}).get("engine") == "stock":  # it does not count bytes
            continue
        before = planned.stages[stage - 1].boundary_bytes if stage else 0
        sent = {"sent to next": expected.boundary_bytes, "received from next": expected.boundary_bytes}
        sent |= {"sent to previous": before, "received from previous": before}
        for result in replicas_of_stage:
            assert result["sent"] == {key: planned.micro_batches * size for key, size in sent.items() if size}
