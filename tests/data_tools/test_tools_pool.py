"""Protects the error message about a worker process that dies."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.units import Killed

from data_tools.pretokenize.pool import UnitPool
from data_tools.pretokenize.units import Unit
from data_tools.sources.inputs import list_inputs
from lime_dist.errors import LimeError


def test_a_dead_workers_signal_is_named_though_two_threads_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor's thread has collected the exit status but not yet recorded it when the pool asks for it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "words"}\n')
    (file,) = list_inputs(str(path))
    unit = Unit(0, ((file, None),), 5)
    waitpid = os.waitpid

    def record_late(pid: int, options: int) -> Any:
        is_main = threading.current_thread() is threading.main_thread()
        time.sleep(0.3 if is_main else 0)
        status = waitpid(pid, options)
        time.sleep(0 if is_main else 1)
        return status

    monkeypatch.setattr(os, "waitpid", record_late)
    message = (
        r"worker process \d+ died at unit 0 \(a\.jsonl\): it was killed by SIGKILL \(out of memory\?\); finished shards"
    )
    with pytest.raises(LimeError, match=message):
        UnitPool(Killed(), 1, "test").run([unit], [unit], lambda _: None)


def test_a_worker_that_dies_before_the_pool_looks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a busy machine a worker can be dead, and forgotten by `multiprocessing`, when the pool first asks about it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "words"}\n')
    (file,) = list_inputs(str(path))
    unit = Unit(0, ((file, None),), 5)

    submit, others = ProcessPoolExecutor.submit, set(multiprocessing.active_children())

    def submit_and_wait_for_death(*arguments: Any) -> Any:
        future = submit(*arguments)
        concurrent.futures.wait([future])
        while set(multiprocessing.active_children()) - others:
            time.sleep(0.1)
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit_and_wait_for_death)
    with pytest.raises(LimeError, match=r"worker process \d+ died at unit 0 \(a\.jsonl\): it was killed by SIGKILL"):
        UnitPool(Killed(), 1, "test").run([unit], [unit], lambda _: None)
