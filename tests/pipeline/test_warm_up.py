"""Protects that no kernel has its first launch, and nothing is compiled, once transfers have begun, and that a warm-up changes nothing.

On a GPU a first launch can wait for the whole device, and with it for every receive that has been posted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.policies import POLICIES
from support.workers import WorkerGroup

from lime_dist.pipeline.warm_up import needs_warm_up

LAUNCHED_LATER = {
    "aten._fused_adamw_.default": "the warm-up updates one parameter of each shape; the kernel is the same for any number of elements",
    "aten._local_scalar_dense.default": "the host reads the mean loss of an evaluation",
    "aten._to_copy.default": "the host reads loss and norms as one float64 tensor",
    "aten.add.Tensor": "DeepSpeed's engine adds the step's loss to its own sum",
    "aten.cat.default": "the host reads loss and norms as one tensor",
    "aten.div_.Tensor": "the loss is averaged over replicas",
    "aten.stack.default": "the last stage reads the losses of its micro-batches with them",
    "c10d.allreduce_.default": "the loss is averaged over replicas",
    "c10d.broadcast_.default": "the last stage tells the others the loss",
}
"""What a step launches for the first time after its passes, and why. By then all receives of the step are over, so nothing that
spins on this stage's device waits for a peer that waits for this stage."""


def settings(
    stages: int, precision: str, zero_stage: int = 0, checkpointing: bool = False, **model: Any
) -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 9,
            "num_attention_heads": 4, "num_key_value_heads": 4, **model,
        },
        "data": {"sequence_length": 8},
        "train": {"global_batch_size": 12, "micro_batch_size": 2},
        "parallel": {
            "pipeline_stages": stages, "zero_stage": zero_stage, "activation_checkpointing": checkpointing,
        },
        "precision": precision,
    }  # fmt: skip


CASES = {
    "kv full": (3, settings(3, "bf16", num_key_value_heads=2)),
    "kv full, fp32, tied, checkpointing": (3, settings(3, "fp32", checkpointing=True, tie_word_embeddings=True)),
    "kv chunked": (3, settings(3, "bf16", lime={"history": POLICIES["chunked"]})),
    "hidden": (3, settings(3, "bf16", lime={"routes": "hidden"})),
    "hidden dynamic": (3, settings(3, "bf16", lime={"routes": "hidden", "router": "dynamic"})),
    "hyper": (3, settings(3, "bf16", architecture="hyper")),
    "gated residual": (3, settings(3, "bf16", architecture="gated_residual")),
    "permutations": (3, settings(3, "bf16", architecture="hyper", hyper={"connection": "permutations"})),
    "attention residuals": (3, settings(3, "bf16", architecture="attention_residuals")),
    "moda": (3, settings(3, "bf16", lime={"depth_attention": "moda", "mlp_entries": True})),
    "value residual": (3, settings(3, "bf16", architecture="value_residual", value_residual={"learnable": True})),
    "llama, two replicas": (4, settings(2, "bf16", zero_stage=1, architecture="llama")),
    "wire": (3, settings(3, "fp32") | {"pipeline": {"wire_dtype": "bf16"}}),
    "weight passes": (3, settings(3, "bf16") | {"pipeline": {"schedule": "zero_bubble"}}),
    "parts": (3, settings(3, "bf16") | {"pipeline": {"schedule": "interleaved"}}),
    "parts, hidden": (2, settings(2, "bf16", lime={"routes": "hidden"}) | {"pipeline": {"schedule": "interleaved"}}),
    "wire, float8": (3, settings(3, "bf16") | {"pipeline": {"wire_dtype": "fp8"}}),
}
for name in ("parts", "parts, hidden"):
    CASES[name][1]["parallel"]["virtual_stages"] = 3


@pytest.mark.parametrize("case", CASES)
def test_a_step_launches_nothing_new(workers: Callable[[int], WorkerGroup], case: str) -> None:
    """By operation, types, shapes and strides, from the first receive of a step to its last pass, and in an evaluation. A warm-up leaves
    no trace, neither before the first step nor between two."""
    size, values = CASES[case]
    for stage, result in enumerate(workers(size).run("support.launches.warm_up", values=values)):
        assert result["changed"] == []
        assert result["losses"] and result["parameters"]
        assert result["passes"] > 10 and result["new in passes"] == [], stage
        assert set(result["new in the rest"]) <= LAUNCHED_LATER.keys(), (
            stage,
            set(result["new in the rest"]) - LAUNCHED_LATER.keys(),
        )


def test_a_warm_up_of_the_stock_engine_changes_nothing(workers: Callable[[int], WorkerGroup]) -> None:
    """Between the passes it exchanges shapes, with blocking transfers."""
    values = settings(2, "bf16") | {"pipeline": {"schedule": "stock"}}
    for result in workers(2).run("support.launches.warm_up", values=values):
        assert result["changed"] == [] and result["losses"] and result["parameters"]


@pytest.mark.slow
def test_a_step_compiles_nothing(workers: Callable[[int], WorkerGroup]) -> None:
    values = settings(2, "fp32")
    values["train"]["compile"] = True
    for warm, later in workers(2).run("support.launches.compilations", values=values):
        assert warm > 0 and later == 0


@pytest.mark.parametrize(
    ("stages", "device", "compiles", "expected"),
    [(2, "cuda", False, True), (2, "cpu", True, True), (2, "cpu", False, False), (1, "cuda", True, False)],
)
def test_who_is_warmed_up(stages: int, device: str, compiles: bool, expected: bool) -> None:
    """One stage makes no transfers, and a CPU loads nothing."""
    assert needs_warm_up(stages, torch.device(device), compiles) == expected
