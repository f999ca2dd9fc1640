"""Notices that this process is to stop: it received a signal, or the launcher that supervised it is gone."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from lime_dist.launchers import launcher_links, parent_of

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
"""A terminal sends SIGINT for Ctrl-C, and SIGHUP when it closes. Launchers and schedulers send SIGTERM. `sbatch --signal` is often
set to send SIGUSR1 before the time limit."""

LAUNCHER_GONE = int(signal.SIGHUP)
"""Stands for the end of the launcher where a signal's number is expected: as for a terminal that is gone."""


class StopSignals:
    """A context in which `SIGNALS` are recorded and do not end the process; enter it in the main thread.

    Signals that are ignored outside, as under ``nohup``, are ignored inside. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[signal.Signals, Any] = {}
        self._launchers = launcher_links()

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number != signal.SIGINT:  # after Ctrl-C, `deepspeed` sends SIGTERM
            self._number = number
        elif number == signal.SIGINT:
            os._exit(128 + signal.SIGINT)

    @property
    def received(self) -> int:
        """The signal that asks the process to stop, else `LAUNCHER_GONE`, else 0. Processes whose launcher is gone would keep
        training unsupervised, beside the run that replaces them."""
        if self._number:
            return self._number
        return LAUNCHER_GONE if any(parent_of(child) != parent for child, parent in self._launchers) else 0


def reason(received: int) -> str:
    """What stopped the run, to follow "stopped by"."""
    return "the end of its launcher or terminal" if received == LAUNCHER_GONE else signal.Signals(received).name
