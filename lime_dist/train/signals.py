"""Notices that this process is to end: a signal has come, or the launcher that would supervise it is gone."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""A launcher or a scheduler sends the first; the second is what `sbatch --signal` is often told to send before a time limit."""

LAUNCHER_GONE = 1
LAUNCHERS = (b"deepspeed", b"torchrun", b"torch.distributed")
"""What the command lines of launchers contain."""


class StopSignals:
    """While entered, SIGTERM and SIGUSR1 do not end the process but are noted; enter in the main thread."""

    def __init__(self) -> None:
        self._came = 0
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
        self._came = number

    @property
    def came(self) -> int:
        """The newest signal, `LAUNCHER_GONE`, or 0."""
        if self._came:
            return self._came
        return LAUNCHER_GONE if any(_parent(child) != parent for child, parent in self._launchers) else 0


def reason(came: int) -> str:
    """What stopped the run, to go after "stopped by"."""
    return "the end of its launcher" if came == LAUNCHER_GONE else signal.Signals(came).name


def _launchers() -> list[tuple[int, int]]:
    """(process, parent) from this process up to the first of its launchers. A parent that ends leaves its child to another
    one; without anybody to supervise them, processes would train on beside the run that is started in their place."""
    links, process = [], os.getpid()
    while (parent := _parent(process)) is not None and _is_launcher(parent):
        links.append((process, parent))
        process = parent
    return links


def _parent(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):  # it is gone
        return None


def _is_launcher(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return any(word in command for word in LAUNCHERS)
