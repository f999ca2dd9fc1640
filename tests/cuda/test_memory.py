"""Protects that plans know what a GPU needs: the peak of live bytes in a step, on the GPU that computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.models import MODELS
from support.on_gpu import Case
from support.workers import WorkerGroup

from lime_dist.config.load import make_config
from lime_dist.config.schema import Checkpointing
from lime_dist.plan.forecast import Machine, forecast

ARCHITECTURES = [
    "llama", "lime kv", "lime kv, chunked", "lime static", "lime dynamic", "hyper static", "hyper dynamic",
    "value residual, learnable", "hyper doubly stochastic", "hyper permutations", "gated residual",
    "attention residuals, 1", "attention residuals, 3", "moda, MLP, full",
]  # fmt: skip
STAGES = [(0, 3), (1, 3), (2, 3), (0, 1)]
"""Index, and number of stages."""
PROCESSES = 2
pytestmark = pytest.mark.slow  # all tests together


def rows() -> Iterator[tuple[str, bool, str, int, int]]:
    """Every architecture, with and without checkpointing, each in a precision and on a kind of stage in turn."""
    for shift, architecture in enumerate(ARCHITECTURES):
        for index, checkpointing in enumerate([False, True]):
            precision = ["bf16", "fp32"][(index + shift) % 2]
            yield architecture, checkpointing, precision, *STAGES[(2 * index + shift) % len(STAGES)]


def values_of(
    architecture: str, checkpointing: Checkpointing, precision: str, stages: int, schedule: str = "1f1b"
) -> dict[str, Any]:
    """A run in which constants are small. In float32, attention on a GPU keeps copies of K/V heads that several query heads share,
    which plans leave out; so there are as many K/V heads as query heads."""
    model = {**MODELS[architecture], "num_attention_heads": 8}
    shared = precision == "bf16" and model.get("lime", {}).get("routes") != "hidden"
    return {
        "model": {
            "architecture": "lime", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 7,
            **model, "num_key_value_heads": 2 if shared else 8,
        },
        "data": {"sequence_length": 1024},
        "train": {"global_batch_size": 8 if schedule == "1f1b" else 16, "micro_batch_size": 4},
        "parallel": {"pipeline_stages": stages, "activation_checkpointing": checkpointing},
        "pipeline": {"schedule": schedule},
        "precision": precision,
    }  # fmt: skip


def offloading(values: dict[str, Any]) -> dict[str, Any]:
    """Eight micro-batches, of which the middle stage has five in flight."""
    values["train"]["global_batch_size"] = 32
    values["parallel"]["offload_history"] = True
    values["pipeline"]["extra_in_flight"] = 3
    return values


SPLIT = [
    (architecture, checkpointing, precision, *STAGES[(index + checkpointing) % len(STAGES)])
    for index, architecture in enumerate(["llama", "lime kv", "lime static", "hyper dynamic"])
    for checkpointing, precision in [((False, "bf16"), (True, "fp32"))[index % 2]]
]
"""Cases with weight passes."""
SELECTIVE = [(architecture, STAGES[turn % len(STAGES)]) for turn, architecture in enumerate(ARCHITECTURES)]
"""Cases in which feed-forward halves are computed again."""
CASES = {
    f"{architecture}, {precision}, {'checkpointed, ' if checkpointing else ''}stage {stage} of {stages}":
    Case("peak", values_of(architecture, checkpointing, precision, stages), stage, stages)
    for architecture, checkpointing, precision, stage, stages in rows()
}  # fmt: skip
CASES |= {
    f"weight passes, {architecture}, {precision}, {'checkpointed, ' if checkpointing else ''}stage {stage} of {stages}":
    Case("peak", values_of(architecture, checkpointing, precision, stages, "zero_bubble"), stage, stages)
    for architecture, checkpointing, precision, stage, stages in SPLIT
}  # fmt: skip
CASES |= {
    f"selective, {architecture}, stage {stage} of {stages}": Case(
        "peak", values_of(architecture, "selective", "bf16", stages), stage, stages
    )
    for architecture, (stage, stages) in SELECTIVE
}
CASES |= {
    f"histories on the host, {architecture}, {schedule}, stage {stage} of 3": Case(
        "peak",
        offloading(values_of(architecture, checkpointing, "bf16", 3, schedule)),
        stage,
        3,
    )
    for architecture, checkpointing, schedule, stage in [
        ("lime kv", False, "1f1b", 1), ("lime static", True, "1f1b", 0), ("lime static", "selective", "zero_bubble", 1),
        ("attention residuals, 1", True, "1f1b", 1), ("moda, MLP, full", True, "zero_bubble", 0),
    ]
}  # fmt: skip
CASES["selective, weight passes"] = Case("peak", values_of("lime kv", "selective", "bf16", 3, "zero_bubble"), 1, 3)


@pytest.fixture(scope="module")
def peaks() -> dict[str, Any]:
    """By case: stage and bytes, or the traceback of what went wrong. Two processes play them."""

    def share(first: int) -> dict[str, Any]:
        names = list(CASES)[first::PROCESSES]
        group, results = WorkerGroup(1), {}
        try:
            for name in names:
                ((results[name],),) = group.run("support.on_gpu.play", cases=[CASES[name]])
        finally:
            group.close()
        return results

    with ThreadPoolExecutor() as threads:
        return {name: peak for part in threads.map(share, range(PROCESSES)) for name, peak in part.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_knows_the_peak(peaks: dict[str, Any], name: str) -> None:
    result, case = peaks[name], CASES[name]
    assert isinstance(result, tuple), result
    planned = forecast(make_config(case.values, "a test"), Machine(1e12, 1e18, 1e12, 0.0), case.size)
    assert result == (case.rank, pytest.approx(planned.stages[case.rank].memory.peak, rel=0.05))
