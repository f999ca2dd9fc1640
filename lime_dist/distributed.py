"""Starts the process group, and shares errors so that no rank waits for one that has given up."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar, cast

import psutil
import torch
import torch.distributed as dist

from lime_dist.contract import SUPPORTED, disable_compiled_operations, limit_new_groups, quiet_logger, unsupported
from lime_dist.errors import LimeError
from lime_dist.host_staging import stage_on_host
from lime_dist.launchers import check_devices, world_size
from lime_dist.rendezvous import check_rendezvous

BACKENDS = ("gloo", "nccl")

T = TypeVar("T")


def check_versions() -> None:
    """Refuse versions of torch and DeepSpeed that the trainer does not support.

    Raises:
        LimeError: such a version is installed.
    """
    from importlib.metadata import version

    for package in SUPPORTED:
        installed = version(package)
        if reason := unsupported(package, installed):
            raise LimeError(f"{package} {installed} is installed; {reason}")


def group_timeout(timeout: float) -> timedelta:
    """The time-out of every process group, if ``timeout`` is `pipeline.timeout` in seconds. It is longer, so that the watchdog ends
    the process first: its message says more."""
    return timedelta(seconds=2 * timeout + 60)


def start_processes(verbose: bool = False, timeout: float = 600.0) -> None:
    """Join the launcher's process group (deepspeed, torchrun); without a launcher, create a group of one process.

    CPU processes on one machine share its cores evenly unless OMP_NUM_THREADS is set. On GPUs, partial sums of bf16 products
    are not rounded to bf16: torch allows that by default, for products that cuBLAS splits along their inner dimension.
    GPUs communicate with NCCL; with LIME_BACKEND=gloo through host memory, and then several processes may share a GPU.

    Args:
        timeout: `pipeline.timeout` in seconds. It bounds the operations of this group and of all that DeepSpeed makes later, and
            the time for which NCCL's monitor bears a driver that hangs (unless TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC is set).

    Raises:
        LimeError: a process has no GPU or not the one that the user chose, LIME_BACKEND names a backend that it cannot use, the
            job's port is in use, or its first host cannot be reached.
    """
    environment = os.environ
    if "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    environment.setdefault("LOCAL_RANK", "0")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    on_gpu = torch.cuda.is_available() and environment.get("DS_ACCELERATOR", "cuda") == "cuda"
    if not on_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
        if "OMP_NUM_THREADS" not in environment:
            local = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world_size())
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    limit = group_timeout(timeout)
    environment.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(limit.total_seconds())))
    backend = choose_backend(on_gpu)
    if on_gpu and backend == "gloo":
        environment["LOCAL_RANK"] = str(int(environment["LOCAL_RANK"]) % torch.cuda.device_count())
        stage_on_host()
    if on_gpu:
        check_devices()
    with quiet(verbose):
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        disable_compiled_operations()
        limit_new_groups(limit)
        check_rendezvous(limit.total_seconds())
        if on_gpu:
            if int(environment["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise LimeError(
                    f"process {environment['LOCAL_RANK']} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                    "launch one process per GPU, or set LIME_BACKEND=gloo to share GPUs, or DS_ACCELERATOR=cpu"
                )
            get_accelerator().set_device(int(environment["LOCAL_RANK"]))
            if backend == "gloo":
                # DeepSpeed would bind the group to the GPU. torch then splits it to make others, which gloo cannot do.
                dist.init_process_group(backend, timeout=limit)
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            timeout=limit,
            verbose=verbose,
        )


def choose_backend(on_gpu: bool) -> str:
    """The backend of all process groups: LIME_BACKEND, or NCCL on GPUs and gloo on CPUs.

    Raises:
        LimeError: LIME_BACKEND names a backend that these processes cannot use.
    """
    chosen = os.environ.get("LIME_BACKEND") or ("nccl" if on_gpu else "gloo")
    if chosen not in BACKENDS:
        raise LimeError(f"LIME_BACKEND={chosen} is not one of {', '.join(BACKENDS)}")
    if chosen == "nccl" and not on_gpu:
        raise LimeError(
            "LIME_BACKEND=nccl needs GPUs, and these processes run on the CPU; leave it out or set it to gloo"
        )
    return chosen


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Silence what DeepSpeed logs and prints while it starts, except errors."""
    if verbose:
        yield
        return
    with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null), quiet_logger():
        warnings.simplefilter("ignore")
        yield


def agree(error: str | None) -> None:
    """Raise the same LimeError on all ranks if any rank has one; all ranks must call it."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for line in errors:
        if line is not None:
            raise LimeError(line)


def together(action: Callable[[], T]) -> T:
    """Run an action on all ranks; a LimeError of any rank is raised on all of them. All ranks must call it."""
    result: T | None = None
    error: str | None = None
    try:
        result = action()
    except LimeError as problem:
        error = str(problem)
    agree(error)
    return cast(T, result)  # `agree` has raised if there is none


def from_main_process(value: T) -> T:
    """The value that rank 0 gives, on all ranks. All ranks must call it."""
    shared: list[T] = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def free_memory() -> int | None:
    """The least bytes that a process of the job finds free on its device, divided among the processes that share it; of the host on a
    CPU. None: unknown. All ranks must call it."""
    found: list[tuple[str, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _own_free_memory())
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    sharing = Counter(device for device, _ in known)
    return min(free // sharing[device] for device, free in known)


def _own_free_memory() -> tuple[str, int] | None:
    """The name of this process's device in the job, and the bytes that are free on it."""
    try:
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            return socket.gethostname(), psutil.virtual_memory().available
        device = torch.cuda.current_device()
        return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}", torch.cuda.mem_get_info()[0]
    except (OSError, RuntimeError, AttributeError):
        return None


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
