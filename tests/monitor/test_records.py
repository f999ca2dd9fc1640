"""Tests of records on a full disk and after going back: whole lines, each step once, nothing lost."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.crashes import TAILS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lime_dist.data.files import WholeAppends
from lime_dist.errors import LimeError
from lime_dist.monitor.console import Console
from lime_dist.monitor.metrics import MetricsFile
from lime_dist.monitor.records import Records
from lime_dist.monitor.tensorboard import TensorBoardLog


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_append_is_whole_or_waits(tmp_path: Path) -> None:
    file = WholeAppends(tmp_path / "file")
    file.write(b"first")
    assert file.waiting and (tmp_path / "file").read_bytes() == b""
    file.flush()
    assert not file.waiting
    with no_file_beyond(8):
        file.write(b"second")
        with pytest.raises(OSError):
            file.flush()
        assert file.waiting and (tmp_path / "file").read_bytes() == b"first"
    file.write(b"third")
    file.flush()
    file.close()
    assert (tmp_path / "file").read_bytes() == b"firstsecondthird"


def record(step: int) -> dict[str, float | int]:
    return {"step": step, "loss": 1 / step, "step_seconds": 0.5}


def test_records_survive_a_full_disk_and_drop_undone_steps(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    board = TensorBoardLog(tmp_path / "tensorboard", "a: 1\n", 0)
    records = Records([metrics, board])
    for step in range(1, 4):
        records.write(record(step))
    with no_file_beyond(100):
        for step in range(4, 7):
            records.write(record(step))
            assert records.problem == f"{tmp_path}/metrics.jsonl cannot be written: [Errno 27] File too large"
        records.flush()
        records.write(record(7))
    assert records.problem is not None
    records.write(record(8))
    assert records.problem is not None and str(board.path) in records.problem, (
        "one file is complete again, the other is not yet"
    )
    records.flush()
    assert records.problem is None
    records.rewind(5)
    for step in range(6, 9):
        records.write({**record(step), "loss": 7.0})
    records.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    wanted = [(step, 1 / step if step < 6 else 7.0) for step in range(1, 9)]
    assert [(line["step"], line["loss"]) for line in lines] == wanted
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    drawn = events.Scalars("train/loss")
    assert [event.step for event in drawn] == list(range(1, 9))
    assert [event.value for event in drawn] == pytest.approx([loss for _, loss in wanted])
    assert events.Tags()["tensors"] == ["config/text_summary", "custom_scalars__config__"]


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_what_a_crash_leaves_at_the_end_is_dropped(tmp_path: Path, tail: bytes) -> None:
    """The records before it stay, a new one begins its own line, and the second start finds nothing to drop."""
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(json.dumps(record(step)).encode() + b"\n" for step in range(1, 4))
    path.write_bytes(whole + tail)
    metrics = MetricsFile(path, 3)
    assert metrics.damaged == len([line for line in tail.split(b"\n") if line])
    metrics.write(record(4))
    metrics.close()
    assert path.read_bytes() == whole + json.dumps(record(4)).encode() + b"\n"
    assert MetricsFile(path, 3).damaged == 0 and path.read_bytes() == whole


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_tensorboard_shows_the_events_around_what_a_crash_left(tmp_path: Path, tail: bytes) -> None:
    first = TensorBoardLog(tmp_path, "a: 1\n", 0)
    first.write(record(1))
    first.close()
    with first.path.open("ab") as file:
        file.write(tail)
    os.rename(first.path, tmp_path / "events.out.tfevents.0000000001.host.1.0")  # of an earlier second
    second = TensorBoardLog(tmp_path, "a: 1\n", 1)
    second.write(record(2))
    second.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_the_log_keeps_every_line_with_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those before it opens, those of earlier starts, and the error that ends the run; a torn line stays one line."""
    path = tmp_path / "console.log"
    for number in range(2):
        console = Console(True)
        console.say(f"early {number}")
        with pytest.raises(LimeError), console.logging(path):
            line = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "router_lr": 0.1, "tokens_per_second": 1.0}
            console.step_line({"step": 1, "step_seconds": 1.0, **line}, 2)
            raise LimeError("full …")
        if number == 0:
            path.write_bytes(path.read_bytes() + b"2026-11-2")
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 1/2 \| loss 1.0000 \| .* left \| \d\d:\d\d:\d\d", said[1]) and len(said) == 4
    written = path.read_text().splitlines()
    assert written[3] == "2026-11-2"
    one = ["early 0", said[1], "error: full …"]
    assert [line[20:] for line in written[:3]] == one
    assert [line[20:27] for line in written[4:]] == ["early 1", "step 1/", "error: "]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in written[:3])
    with pytest.raises(KeyboardInterrupt), Console(True).logging(path):
        raise KeyboardInterrupt
    assert path.read_text().splitlines()[-1][20:] == "KeyboardInterrupt: "
    other = Console(False)
    with other.logging(tmp_path / "other"):
        other.say("nothing")
    assert not (tmp_path / "other").exists()


def test_a_log_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, Path("/nowhere/console.log")):
        console = Console(True)
        with console.logging(path):
            console.say("a line")
    assert capsys.readouterr().out == "a line\na line\n"


def test_a_closed_output_does_not_stop_training(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as closed:
        monkeypatch.setattr("sys.stdout", closed)
        Console(True).say("a line")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # so that closing the stream succeeds
