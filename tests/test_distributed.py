"""Tests of how processes start and with which backend they communicate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.workers import WorkerGroup

from lime_dist.distributed import choose_backend, group_timeout
from lime_dist.errors import LimeError


def test_nothing_is_compiled_at_the_start(workers: Callable[[int], WorkerGroup]) -> None:
    """Where there is a compiler, DeepSpeed would spend half a minute on a shared-memory operation that nothing uses."""
    assert workers(1).run("support.cases.compiled_operation") == [None]


def test_partial_sums_of_bf16_products_are_not_rounded(workers: Callable[[int], WorkerGroup]) -> None:
    assert workers(1).run("support.cases.rounds_partial_sums") == [False]


@pytest.mark.parametrize(
    ("given", "on_gpu", "backend"), [("", True, "nccl"), ("", False, "gloo"), ("gloo", True, "gloo")]
)
def test_the_backend(monkeypatch: pytest.MonkeyPatch, given: str, on_gpu: bool, backend: str) -> None:
    """LIME_BACKEND decides where it is set."""
    monkeypatch.setenv("LIME_BACKEND", given)
    assert choose_backend(on_gpu) == backend


@pytest.mark.parametrize(("given", "says"), [("nccl", "needs GPUs"), ("mpi", "not one of gloo, nccl")])
def test_a_backend_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, given: str, says: str) -> None:
    monkeypatch.setenv("LIME_BACKEND", given)
    with pytest.raises(LimeError, match=f"LIME_BACKEND={given} .*{says}"):
        choose_backend(on_gpu=False)


@pytest.mark.parametrize("engine", ["overlap", "stock"])
def test_transfers_through_host_memory(workers: Callable[[int], WorkerGroup], engine: str) -> None:
    """gloo cannot send tensors that are not in host memory. With all tensors taken for such, steps give the same bits, and
    every payload and gradient has been copied."""
    values = {
        "model": {
            "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        "data": {"sequence_length": 8},
        "train": {"global_batch_size": 8, "micro_batch_size": 2},
        "parallel": {"pipeline_stages": 2},
        "pipeline": {"engine": engine},
    }  # fmt: skip
    for direct, staged, sent, received in workers(2).run("support.transfers.steps_through_host_memory", values=values):
        assert staged == direct
        assert min(sent, received) >= 8, "four micro-batches, two steps"


def test_one_time_out_for_all_groups(workers: Callable[[int], WorkerGroup]) -> None:
    """Also for those that DeepSpeed makes, without giving a time-out: replicas, pipelines, tied weights, all ranks."""
    values = {
        "model": {
            "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
            "num_attention_heads": 4, "tie_word_embeddings": True,
        },
        "data": {"sequence_length": 8},
        "train": {"global_batch_size": 8, "micro_batch_size": 2},
        "parallel": {"pipeline_stages": 2},
        "pipeline": {"timeout": 600},
    }  # fmt: skip
    limit = group_timeout(600).total_seconds()
    for seconds, heartbeat in workers(4).run("support.transfers.group_timeouts", values=values):
        assert len(seconds) >= 8 and set(seconds) == {limit}
        assert float(heartbeat) == limit > 600
