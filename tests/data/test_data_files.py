"""Tests of the lock of a folder, and of files of lines that a crash has damaged."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from support.crashes import TAILS

from lime_dist.data.files import lock_folder, read_json_lines
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


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_whole_lines_before_and_behind_damage_are_kept(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\r\n' + tail + b'\n\0\0{"a": 3}')
    lines, dropped = read_json_lines(path)
    assert [value for _, value in lines] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [line for line, _ in lines] == [b'{"a": 1}', b'{"a": 2}', b'{"a": 3}']
    assert dropped == len([line for line in tail.split(b"\n") if line])


def test_an_empty_and_a_missing_file_have_no_lines(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert read_json_lines(tmp_path / "empty") == read_json_lines(tmp_path / "missing") == ([], 0)
