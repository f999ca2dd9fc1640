"""Ends the process with one line when it does not get on: a pipeline whose peer has died or stopped would wait for ever."""

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
"""Exit status of a process that the watchdog ended."""


@dataclass
class _Now:
    """What the process is doing, and since when (None: nothing that is watched)."""

    place: str = ""
    since: float | None = None


class Watchdog:
    """Watches what one thread does, from another one that needs no answer from any library.

    Args:
        timeout: seconds that one watched piece of work may take.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._now = _Now()
        self._stop: threading.Event | None = None

    @contextmanager
    def watching(self, place: str) -> Iterator[None]:
        """Within, ``place`` must not take longer than the timeout; pieces of work may lie within each other."""
        if self._stop is None:
            self._start()
        now, before = self._now, (self._now.place, self._now.since)
        now.place, now.since = place, time.monotonic()
        try:
            yield
        finally:
            now.place, now.since = before[0], None if before[1] is None else time.monotonic()

    def _start(self) -> None:
        """Start the thread; it knows nothing that would keep the watchdog alive."""
        self._stop = threading.Event()
        arguments = (self._now, self.timeout, self._stop)
        threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True).start()
        weakref.finalize(self, self._stop.set)


def _watch(now: _Now, timeout: float, stop: threading.Event) -> None:
    while not stop.wait(min(1.0, timeout / 10)):
        since, place = now.since, now.place
        if since is not None and time.monotonic() - since > timeout:
            end_process(f"{place}: nothing for {timeout:g} s (pipeline.timeout); ending the job")


def end_process(line: str) -> None:
    """Say why and end this process at once: no teardown, which could wait for a peer in its turn."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(STALLED_STATUS)
