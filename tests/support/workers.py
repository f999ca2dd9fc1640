"""Persistent groups of gloo processes: starting two processes with DeepSpeed takes seconds, and there are many cases."""

from __future__ import annotations

import gc
import importlib
import io
import pickle
import traceback
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import torch
from support import processes
from support.collector import freeze_imported
from torch import Tensor

TIMEOUT = 240.0
"""Seconds that a case may take before its group is ended. A pipeline that hangs reaches it."""


def _work(rank: int, size: int, port: int, pipe: Connection) -> None:
    """Run cases by name until the pipe closes. The process groups that a case makes are destroyed after it."""
    processes.prepare(rank, size, port)
    from lime_dist.distributed import start_processes

    start_processes()
    import torch.distributed as dist

    new_group, made = dist.new_group, []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        made.append(group)
        return group

    dist.new_group = remembered
    while True:
        freeze_imported()
        try:
            module, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result: Any = (True, getattr(importlib.import_module(module), function)(**arguments))
        except BaseException:
            result = (False, traceback.format_exc())
        pipe.send_bytes(_pickled(result))
        if not result[0]:
            return
        result = None
        gc.collect()  # engines are part of reference cycles, and hold the threads of their groups
        dist.barrier()
        while made:
            group = made.pop()
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)


class _Pickler(pickle.Pickler):
    """Pickle tensors as bytes. The pickler of multiprocessing makes a shared file for each, which took longer than a case."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        return _tensor, (value.detach().reshape(-1).view(torch.uint8).numpy(), value.dtype, value.shape)


def _tensor(content: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


class WorkerGroup:
    """``size`` processes in one gloo group; ``run`` calls a function on all of them and returns what each returned."""

    def __init__(self, size: int) -> None:
        ends = [Pipe() for _ in range(size)]
        self._pipes: list[Connection] = [ours for ours, _ in ends]
        self._processes = processes.start(size, _work, lambda rank: (ends[rank][1],))
        for _, theirs in ends:
            theirs.close()

    def run(self, function: str, **arguments: Any) -> list[Any]:
        """Call ``module.function`` on every rank; an exception on any rank is raised here, with its traceback."""
        module, _, name = function.rpartition(".")
        for pipe in self._pipes:
            pipe.send((module, name, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                good, value = (
                    pickle.loads(pipe.recv_bytes()) if pipe.poll(TIMEOUT) else (False, f"did not finish in {TIMEOUT} s")
                )
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
