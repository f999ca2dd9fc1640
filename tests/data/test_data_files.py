"""Tests of the lock of a folder: one writer at a time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from lime_dist.data.files import lock_folder
from lime_dist.errors import LimeError


def test_a_folder_has_one_writer_and_a_patient_one_waits(tmp_path: Path) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_folder(tmp_path):
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(20)
    for patience in (0.0, 0.2):
        begin = time.monotonic()
        with pytest.raises(LimeError, match="another run is writing here"), lock_folder(tmp_path, patience):
            pass
        assert patience <= time.monotonic() - begin < patience + 5
    threading.Timer(0.2, release.set).start()
    with lock_folder(tmp_path, 20.0):
        assert release.is_set()
    thread.join()


def test_an_error_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), lock_folder(tmp_path):
        raise BlockingIOError("of the caller's own")
    with lock_folder(tmp_path):
        pass
