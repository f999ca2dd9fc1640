"""Starting the process group, and agreeing on errors so that no rank waits for one that has given up."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from lime_dist.errors import LimeError

KNOWN_BAD_DEEPSPEED = ("0.18.3", "0.19.2")
"""First and last DeepSpeed version that scales gradients wrongly or hangs under pipelines."""


def world_size() -> int:
    """The number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True on rank 0, before and after the process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def check_versions() -> None:
    """Refuse versions of DeepSpeed that train wrongly.

    Raises:
        LimeError: a known bad version is installed.
    """
    from importlib.metadata import version

    from packaging.version import Version

    found = version("deepspeed")
    first, last = KNOWN_BAD_DEEPSPEED
    if Version(first) <= Version(found) <= Version(last):
        raise LimeError(
            f"DeepSpeed {found} is installed; {first}–{last} scale gradients wrongly or hang under pipelines: "
            "pip install -c constraints.txt deepspeed"
        )


def start_processes(verbose: bool = False, patience: float = 1800.0) -> None:
    """Join the process group: of a launcher (deepspeed, torchrun) where there is one, else a group of one process.

    CPU processes of one machine share its cores evenly unless OMP_NUM_THREADS says otherwise.

    Args:
        patience: seconds that one operation of the group may take.
    """
    environment = os.environ
    if "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    environment.setdefault("LOCAL_RANK", "0")
    on_gpu = torch.cuda.is_available() and environment.get("DS_ACCELERATOR", "cuda") == "cuda"
    if not on_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
        if "OMP_NUM_THREADS" not in environment:
            local = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world_size())
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    with quiet(verbose):
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        # On CPUs it would compile, for half a minute and where there is a compiler, an operation that nothing here uses.
        backend: Any = import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None
        if on_gpu:
            if int(environment["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise LimeError(
                    f"process {environment['LOCAL_RANK']} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                    "launch one process a GPU, or set DS_ACCELERATOR=cpu"
                )
            get_accelerator().set_device(int(environment["LOCAL_RANK"]))
        else:
            # DeepSpeed would compile a kernel that inference alone uses: half a minute at the first start on a machine.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=patience),
            verbose=verbose,
        )


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Silence what DeepSpeed logs and prints while it starts; errors still come through."""
    if verbose:
        yield
        return
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:  # a logger that was made in here holds the stream that is about to close
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.stream = sys.stderr


def agree(error: str | None) -> None:
    """Raise the same LimeError on all ranks if any rank has one; called by all ranks together."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, error)
    for line in found:
        if line is not None:
            raise LimeError(line)


def free_port() -> int:
    """A port that nothing listens on, on this machine, now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
