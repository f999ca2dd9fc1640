"""Hang detection: end the process with one line if it makes no progress. Without it a stage waits forever for a peer that hangs.

A GPU runs what its host has queued, so the host is further than its device: it may wait at one place for a whole step, and the work
that hangs is another. So every piece of work is followed by an event in the device's queue. While events are pending, the oldest of
them names the work that the device is doing, and only the device counts.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

STALLED_STATUS = 1
"""Exit status of a process that the watchdog ends."""


class DeviceEvent(Protocol):
    """A mark in the queue of a device, such as `torch.cuda.Event`."""

    def record(self) -> None:
        """Put it behind the work that has been queued."""

    def query(self) -> bool:
        """Whether the device has come to it. Does not wait."""


class Work(NamedTuple):
    """A piece of work and the time at which it began, or at which it was queued."""

    place: str
    since: float


class Progress:
    """What the watched thread does, and how far its device is. The watched thread calls `watching`, another thread `overdue`.

    Args:
        timeout: seconds that one piece of work may take.
        make_event: None on a CPU, which has no queue.
    """

    def __init__(
        self,
        timeout: float,
        make_event: Callable[[], DeviceEvent] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout, self._make_event, self._now = timeout, make_event, now
        self._current: Work | None = None
        self._queued: deque[tuple[DeviceEvent, Work]] = deque()
        self._advanced = -float("inf")  # when the device was last seen to have completed something

    @contextmanager
    def watching(self, place: str) -> Iterator[None]:
        """Watch the work within. When a nested piece of work ends, the time of the outer one starts anew."""
        before = self._current
        self._current = Work(place, self._now())
        try:
            yield
            if self._make_event is not None:
                event = self._make_event()
                event.record()
                self._queued.append((event, Work(place, self._now())))
        finally:
            self._current = None if before is None else Work(before.place, self._now())

    def overdue(self) -> str | None:
        """The piece of work that has taken too long: the oldest on the device or, if the device has nothing to do, that of the host."""
        while self._queued and _is_over(self._queued[0][0]):
            self._queued.popleft()
            self._advanced = self._now()
        work = self._queued[0][1] if self._queued else self._current
        if work is None or self._now() - max(work.since, self._advanced) <= self._timeout:
            return None
        return work.place


def _is_over(event: DeviceEvent) -> bool:
    try:
        return event.query()
    except RuntimeError:  # the device has failed; the watched thread will get the same error
        return True


class Watchdog:
    """Watches one thread from another thread, which calls nothing that waits, neither for a peer nor for the device.

    A query of an event can hang only if the driver does. Then NCCL's own monitor ends the process (`start_processes`).

    Args:
        timeout: seconds that one watched piece of work may take.
        device: on which the watched thread works.
    """

    def __init__(self, timeout: float, device: torch.device) -> None:
        self.timeout = timeout
        self._progress = Progress(timeout, None if device.type == "cpu" else torch.get_device_module(device).Event)
        self._stop: threading.Event | None = None

    @contextmanager
    def watching(self, place: str) -> Iterator[None]:
        """Watch the work within, which ``place`` describes. When a nested piece of work ends, the time of the outer one starts anew."""
        if self._stop is None:
            self._start()
        with self._progress.watching(place):
            yield

    def _start(self) -> None:
        """Start the thread. It holds no reference to the watchdog, so that the watchdog can be freed."""
        self._stop = threading.Event()
        arguments = (self._progress, self.timeout, self._stop)
        threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True).start()
        weakref.finalize(self, self._stop.set)


def _watch(progress: Progress, timeout: float, stop: threading.Event) -> None:
    while not stop.wait(min(1.0, timeout / 10)):
        place = progress.overdue()
        if place is not None:
            end_process(f"{place}: no progress for {timeout:g} s (pipeline.timeout); ending the job")


def end_process(line: str) -> None:
    """Print the line and end this process at once, without a teardown, which could wait for a peer as well."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(STALLED_STATUS)
