"""Tests that every request to stop is noticed, and that signal handlers are restored afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lime_dist.train.signals import LAUNCHER_GONE, StopSignals, reason


def test_signals_are_recorded_only_inside_the_context() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with StopSignals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert reason(signal.SIGTERM) == "SIGTERM" and reason(LAUNCHER_GONE) == "the end of its launcher or terminal"


def test_ctrl_c_is_recorded_and_outlasts_the_launchers_signal() -> None:
    """A terminal interrupts `deepspeed` and its processes; `deepspeed` then sends SIGTERM as well."""
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGINT and reason(signals.received) == "SIGINT"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may run, ignores it
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup, and for Ctrl-C in the background of a script."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        with StopSignals() as signals:
            for number in before:
                os.kill(os.getpid(), number)
            assert signals.received == 0
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    script = (
        "import os, signal\nfrom lime_dist.train.signals import StopSignals\n"
        "with StopSignals():\n    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


RANK = """
import sys, time
from lime_dist.train.signals import StopSignals
with StopSignals() as signals:
    assert signals.received == 0
    print("ready", flush=True)
    deadline = time.monotonic() + 20
    while not signals.received and time.monotonic() < deadline:
        time.sleep(0.01)
    open(sys.argv[1], "w").write(str(signals.received))
"""


def test_the_end_of_a_launcher_is_noticed(tmp_path: Path) -> None:
    """One "deepspeed" starts another, which starts a rank; the outer one is killed."""
    mark = tmp_path / "came"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}, {str(mark)!r}])  # deepspeed"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])  # deepspeed"
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.kill()
        deadline = time.monotonic() + 20
        while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert mark.read_text() == str(LAUNCHER_GONE)
