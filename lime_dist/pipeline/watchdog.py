"""Hang detection: end the process with one line if it makes no progress. Without it a stage waits forever for a peer that hangs."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STALLED_STATUS = 1
"""Exit status of a process that the watchdog ends."""


@dataclass
class _Now:
    """The current piece of work and when it began; None if none is watched."""

    place: str = ""
    since: float | None = None


class Watchdog:
    """Watches one thread from another thread, which calls no library that could hang.

    Args:
        timeout: seconds that one watched piece of work may take.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._now = _Now()
        self._stop: threading.Event | None = None

    @contextmanager
    def watching(self, place: str) -> Iterator[None]:
        """Watch the work within, which ``place`` describes. When a nested piece of work ends, the time of the outer one starts anew."""
        if self._stop is None:
            self._start()
        now, before = self._now, (self._now.place, self._now.since)
        now.place, now.since = place, time.monotonic()
        try:
            yield
        finally:
            now.place, now.since = before[0], None if before[1] is None else time.monotonic()

    def _start(self) -> None:
        """Start the thread. It holds no reference to the watchdog, so that the watchdog can be freed."""
        self._stop = threading.Event()
        arguments = (self._now, self.timeout, self._stop)
        threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True).start()
        weakref.finalize(self, self._stop.set)


def _watch(now: _Now, timeout: float, stop: threading.Event) -> None:
    while not stop.wait(min(1.0, timeout / 10)):
        since, place = now.since, now.place
        if since is not None and time.monotonic() - since > timeout:
            end_process(f"{place}: no progress for {timeout:g} s (pipeline.timeout); ending the job")


def end_process(line: str) -> None:
    """Print the line and end this process at once, without a teardown, which could wait for a peer as well."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(STALLED_STATUS)
