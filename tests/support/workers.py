"""Persistent groups of gloo processes: starting two processes with DeepSpeed takes seconds, and there are many cases."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent
TIMEOUT = 240.0
"""Seconds that a case may take before its group is ended; a hang of the pipeline shows as this."""


def _work(rank: int, size: int, port: int, pipe: Connection) -> None:
    """Run cases by name until the pipe closes. Every group that a case makes is destroyed after it."""
    sys.path[:0] = [str(SUPPORT.parent), str(SUPPORT.parents[1])]
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    from lime_dist.distributed import start_processes

    torch.set_num_threads(1)
    start_processes()
    import torch.distributed as dist

    new_group, made = dist.new_group, []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        made.append(group)
        return group

    dist.new_group = remembered
    while True:
        try:
            module, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result: Any = (True, getattr(importlib.import_module(module), function)(**arguments))
        except BaseException:
            result = (False, traceback.format_exc())
        pipe.send(result)
        if not result[0]:
            return
        dist.barrier()
        while made:
            group = made.pop()
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)


class WorkerGroup:
    """``size`` processes in one gloo group; ``run`` calls a function on all of them and returns what each returned."""

    def __init__(self, size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: str, **arguments: Any) -> list[Any]:
        """Call ``module.function`` on every rank; an exception on any rank is raised here, with its traceback."""
        module, _, name = function.rpartition(".")
        for pipe in self._pipes:
            pipe.send((module, name, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                good, value = pipe.recv() if pipe.poll(TIMEOUT) else (False, f"did not finish in {TIMEOUT} s")
            except EOFError:
                good, value = False, "the process died"
            (results if good else failures).append(value if good else f"rank {rank}: {value}")
        if failures:
            self.close()
            raise RuntimeError("\n".join(failures))
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes = []

    @property
    def alive(self) -> bool:
        return bool(self._processes)
