"""Worker processes for units of the input, with shared progress, retries, and immediate reports of dead workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from data_tools.common import progress_bar, start_worker
from data_tools.pretokenize.units import Unit
from data_tools.sources import hub_requests
from data_tools.sources.inputs import RemoteDamage
from lime_dist.errors import LimeError

COUNTERS = 3  # per unit: text bytes, tokens, process
MOST_DAMAGE = 5  # different ones that a unit of remote files may show before one shows twice
Result = TypeVar("Result")
Returned = TypeVar("Returned", covariant=True)


class Stopped(Exception):
    """The parent has asked the workers to stop."""


class Progress:
    """A worker's progress on one unit, in memory that the parent reads."""

    def __init__(self, shared: Any, unit: int) -> None:
        self._shared, self._first = shared, 1 + COUNTERS * unit

    def begin(self) -> None:
        """Record that this process starts the unit from its beginning."""
        self._shared[self._first : self._first + COUNTERS] = [0, 0, os.getpid()]

    def add(self, text_bytes: int, tokens: int) -> None:
        """Count finished work.

        Raises:
            Stopped: the parent has asked the workers to stop.
        """
        self._shared[self._first] += text_bytes
        self._shared[self._first + 1] += tokens
        if self._shared[0]:
            raise Stopped


class Task(Protocol[Returned]):
    """What workers do with each unit; it is sent to every worker once."""

    def prepare(self) -> None:
        """Open what the task needs, in the worker."""

    def __call__(self, unit: Unit, progress: Progress) -> Returned: ...


_worker: dict[str, Any] = {}  # set by the initialiser for all units of this worker process


def _start(parent: int, task: Task[Any], shared: Any, signed: dict[str, str]) -> None:
    start_worker(parent)
    hub_requests.signed.update(signed)
    task.prepare()
    _worker.update(task=task, shared=shared)


def _run(unit: Unit) -> Any:
    progress, damage = Progress(_worker["shared"], unit.index), set[str]()
    while True:
        progress.begin()
        try:
            return _worker["task"](unit, progress)
        except RemoteDamage as error:
            if str(error) in damage or len(damage) == MOST_DAMAGE:
                often = "twice" if str(error) in damage else f"after {MOST_DAMAGE} other damages"
                raise LimeError(
                    f"{unit}: {error}, {often}; nothing of it is kept: run the same command again, or download the file, compare "
                    "its SHA-256 and give it as a local one"
                ) from None
            damage.add(str(error))


class RememberingContext(SpawnContext):
    """Starts processes as ``spawn`` does, and keeps them: `multiprocessing` forgets a process as soon as it has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[BaseProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # the base has a class here
        process = SpawnProcess(*args, **kwargs)
        self.started.append(process)
        return process


class UnitPool(Generic[Result]):
    """Runs a task on units in ``workers`` processes.

    Processes are spawned, not forked: a fork would copy locks that threads of pyarrow and sentencepiece hold.
    """

    def __init__(self, task: Task[Result], workers: int, description: str) -> None:
        self._task, self._workers, self._description = task, workers, description

    def run(self, units: list[Unit], todo: list[Unit], publish: Callable[[Result], None]) -> tuple[int, float]:
        """Run the task on the units ``todo``; the other ``units`` count as done. ``publish`` gets each result as it arrives.

        Returns:
            The bytes of text processed and the seconds taken.

        Raises:
            LimeError: a worker died; published results stay.
        """
        context = RememberingContext()
        shared = context.RawArray("q", 1 + COUNTERS * (1 + max(unit.index for unit in units)))
        counts = np.frombuffer(shared, dtype=np.int64)[1:].reshape(-1, COUNTERS)
        sizes = np.zeros(len(counts), dtype=np.int64)
        sizes[[unit.index for unit in units]] = [unit.text_bytes for unit in units]
        waiting, running, begin = iter(todo), dict[Future[Result], Unit](), time.perf_counter()
        done_bytes = int(sizes.sum()) - sum(unit.text_bytes for unit in todo)
        workers = min(self._workers, len(todo))
        pool = ProcessPoolExecutor(
            workers, context, _start, (os.getpid(), self._task, shared, dict(hub_requests.signed))
        )
        bar = progress_bar(int(sizes.sum()), self._description, initial=done_bytes)
        try:
            while True:
                for unit in islice(waiting, 2 * workers - len(running)):
                    running[pool.submit(_run, unit)] = unit
                if not running:
                    break
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    publish(future.result())
                    done_bytes += running.pop(future).text_bytes
                under_way = [unit.index for unit in running.values()]
                text_bytes, tokens, _ = counts.sum(axis=0).tolist()
                speed = text_bytes / 1e6 / (time.perf_counter() - begin)
                token_count = f"{tokens / 1e6:.2f} M tokens, " if tokens else ""
                bar.set_postfix_str(f"{token_count}{speed:.1f} MB/s", refresh=False)
                bar.update(done_bytes + int(np.minimum(counts[under_way, 0], sizes[under_way]).sum()) - bar.n)
        except BrokenProcessPool:
            pool.shutdown()  # all exit statuses are known only after this: two threads may wait for the same child
            begun = [unit for unit in running.values() if counts[unit.index, 2]]
            raise LimeError(_describe_death(context.started, begun, counts[:, 2])) from None
        finally:
            shared[0] = 1
            pool.shutdown(cancel_futures=True)
            bar.close()
        return int(counts[:, 0].sum()), time.perf_counter() - begin


def _describe_death(children: list[BaseProcess], under_way: list[Unit], holders: np.ndarray) -> str:
    """Say which worker died, how, and at which unit. The executor ends the others with SIGTERM."""
    dead = [child for child in children if child.exitcode not in (None, 0, -signal.SIGTERM)] or children
    child = min(dead, key=lambda child: child.pid or 0)
    status = child.exitcode or 0
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    own_units = [str(unit) for unit in under_way if holders[unit.index] == child.pid]
    where = own_units[-1] if own_units else ", ".join(map(str, under_way)) or "no unit"
    return (
        f"worker process {child.pid} died at {where}: it {how}{' (out of memory?)' if status == -signal.SIGKILL else ''}; "
        "finished shards are kept, run the same command again, with fewer --workers if memory is short"
    )
