"""Tests of how processes start and with which backend they communicate."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch
from support import processes
from support.workers import WorkerGroup

from lime_dist.distributed import choose_backend, group_timeout, start_processes
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


def _start_on_one_gpu(rank: int, size: int, port: int, results: Connection) -> None:
    """Start with what torch and DeepSpeed would report on a machine with one GPU; then make a group and use it."""
    processes.prepare(rank, size, port)
    os.environ["LIME_BACKEND"] = "gloo"
    del os.environ["DS_ACCELERATOR"]
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    accelerator, devices = type(get_accelerator()), []
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    accelerator.device_name = lambda self, index=None: "cuda" if index is None else f"cuda:{index}"
    accelerator.device = lambda self, index=None: torch.device("cuda", index or 0)
    accelerator.set_device = lambda self, index: devices.append(index)
    try:
        start_processes()
        assert (dist.new_group([0]) is dist.GroupMember.NON_GROUP_MEMBER) == (rank == 1)
        total = torch.ones(())
        dist.all_reduce(total)
        results.send((f"device {devices[0]}", f"sum {total.item():.0f}"))
    except Exception as error:
        results.send(repr(error))
        raise


def test_two_processes_share_a_gpu() -> None:
    """Both take the one GPU, and gloo can make groups that one of them is not in."""
    ends = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    started = processes.start(2, _start_on_one_gpu, lambda rank: (ends[rank][1],))
    try:
        said = [ours.recv() if ours.poll(60) else "nothing" for ours, _ in ends]
    finally:
        for process in started:
            process.kill()
    assert said == [("device 0", "sum 2"), ("device 0", "sum 2")]
