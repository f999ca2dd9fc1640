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
    assert reason(signal.SIGTERM) == "SIGTERM" and reason(LAUNCHER_GONE) == "the end of its launcher"


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
