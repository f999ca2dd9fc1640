"""Notices that this process is to stop: it received a signal, or the launcher that supervised it is gone."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Launchers and schedulers send SIGTERM. `sbatch --signal` is often set to send SIGUSR1 before the time limit."""

LAUNCHER_GONE = 1
"""Stands for the end of the launcher where a signal's number is expected."""

LAUNCHERS = (b"deepspeed", b"torchrun", b"torch.distributed")
"""The command line of a launcher contains one of these."""


class StopSignals:
    """A context in which SIGTERM and SIGUSR1 are recorded and do not end the process; enter it in the main thread."""

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[signal.Signals, Any] = {}
        self._launchers = _launchers()

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    @property
    def received(self) -> int:
        """The newest signal, else `LAUNCHER_GONE`, else 0."""
        if self._number:
            return self._number
        return LAUNCHER_GONE if any(_parent(child) != parent for child, parent in self._launchers) else 0


def reason(received: int) -> str:
    """What stopped the run, to follow "stopped by"."""
    return "the end of its launcher" if received == LAUNCHER_GONE else signal.Signals(received).name


def _launchers() -> list[tuple[int, int]]:
    """(process, parent) for each link from this process up to the first of its launchers.

    When a parent ends, its child gets another parent. Without this check, processes that nobody supervises would keep
    training beside the run that replaces them.
    """
    links, process = [], os.getpid()
    while (parent := _parent(process)) is not None and _is_launcher(parent):
        links.append((process, parent))
        process = parent
    return links


def _parent(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):  # the process is gone
        return None


def _is_launcher(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return any(word in command for word in LAUNCHERS)
