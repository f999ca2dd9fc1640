"""Processes for tests: forked from one server that has imported the libraries once, since importing them takes seconds."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
PRELOADED = ["lime_dist.train.loop", "lime_dist.train.build", "torch._dynamo", "torch.utils.tensorboard"]
"""torch's optimizers import torch._dynamo, which takes longer than everything else."""


def start(size: int, target: Callable[..., None], arguments_of: Callable[[int], tuple[Any, ...]]) -> list[BaseProcess]:
    """Start ``size`` processes that run ``target(rank, size, port, *arguments_of(rank))``, to form a gloo group."""
    _start_server()
    context = multiprocessing.get_context("forkserver")
    port = _free_port()
    processes: list[BaseProcess] = []
    for rank in range(size):
        arguments = (rank, size, port, *arguments_of(rank))
        process = context.Process(target=target, args=arguments, daemon=True)
        process.start()
        processes.append(process)
    return processes


def prepare(rank: int, size: int, port: int) -> None:
    """Set up a new process: the environment that a launcher would set, and one thread."""
    sys.path[:0] = [str(SUPPORT.parent), str(SUPPORT.parents[1])]
    os.environ.update(
        ENVIRONMENT, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)


def _start_server() -> None:
    """Start the server with the processes' environment, since DeepSpeed looks for an accelerator when it is imported."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        multiprocessing.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
