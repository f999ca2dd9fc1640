"""Protects the error message about a worker process that dies."""

from __future__ import annotations

import os
import threading
import time
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


def test_a_worker_that_was_never_seen_alive_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a busy machine a worker can die before the pool first looks at its children."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "words"}\n')
    (file,) = list_inputs(str(path))
    unit = Unit(0, ((file, None),), 5)
    monkeypatch.setattr("multiprocessing.active_children", list)
    with pytest.raises(LimeError, match=r"a worker process died at unit 0 \(a\.jsonl\); finished shards are kept"):
        UnitPool(Killed(), 1, "test").run([unit], [unit], lambda _: None)
