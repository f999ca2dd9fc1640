"""Protects hang detection: it names the work that hangs, on the host or on the device, and ends no step that makes progress.

Time is a number here, and the device of these tests completes what they tell it to.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from lime_dist.pipeline.watchdog import STALLED_STATUS, Progress, Watchdog

TIMEOUT = 10.0


class Device:
    """Completes events in the order in which they were recorded, when told to."""

    def __init__(self) -> None:
        self.recorded = self.completed = 0
        self.fails = False

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self._device, self._number = device, 0

    def record(self) -> None:
        self._device.recorded += 1
        self._number = self._device.recorded

    def query(self) -> bool:
        if self._device.fails:
            raise RuntimeError("device-side assert triggered")
        return self._number <= self._device.completed


class Run:
    """A host and, if it has one, its device."""

    def __init__(self, with_device: bool = True) -> None:
        self.time, self.device = 0.0, Device()
        self.progress = Progress(TIMEOUT, self.device.event if with_device else None, lambda: self.time)

    def queue(self, *places: str) -> None:
        for place in places:
            with self.progress.watching(place):
                pass

    def later(self, seconds: float, completed: int = 0) -> str | None:
        """Let time pass in which the device completes some work; returns what is overdue then."""
        self.time += seconds
        self.device.completed += completed
        return self.progress.overdue()

    @contextmanager
    def queued_step(self, instructions: int) -> Iterator[None]:
        """The host has queued a step and waits for its loss."""
        with self.progress.watching("the loss"):
            self.queue(*(f"instruction {number}" for number in range(instructions)))
            yield


def test_a_long_step_is_healthy_while_every_instruction_is_in_time() -> None:
    run = Run()
    with run.queued_step(50):
        assert [run.later(0.9 * TIMEOUT, 1) for _ in range(50)] == [None] * 50
        assert run.later(0.9 * TIMEOUT) is None
        assert run.later(0.2 * TIMEOUT) == "the loss", (
            "the device has nothing to do, so the host waits for something else"
        )
    run.device.completed += 1
    assert run.later(100 * TIMEOUT) is None, "nothing is watched"


def test_without_events_the_same_step_would_be_ended() -> None:
    """What the watchdog did on GPUs before: it timed the place at which the host waits."""
    run = Run(with_device=False)
    with run.queued_step(50):
        assert run.later(0.9 * TIMEOUT) is None
        assert run.later(0.9 * TIMEOUT) == "the loss"


@pytest.mark.parametrize("hanging", [0, 7, 49])
def test_the_instruction_that_hangs_on_the_device_is_named(hanging: int) -> None:
    run = Run()
    with run.queued_step(50):
        assert [run.later(0.9 * TIMEOUT, 1) for _ in range(hanging)] == [None] * hanging
        assert run.later(0.9 * TIMEOUT) is None
        assert run.later(0.2 * TIMEOUT) == f"instruction {hanging}"


def test_a_host_that_goes_on_does_not_hide_a_device_that_hangs() -> None:
    run = Run()
    overdue = []
    for number in range(12):
        run.queue(f"instruction {number}")
        overdue.append(run.later(0.1 * TIMEOUT))
    assert overdue == [None] * 10 + ["instruction 0"] * 2


def test_a_host_that_hangs_is_named_once_its_device_has_nothing_to_do() -> None:
    run = Run()
    run.queue("instruction 0")
    with run.progress.watching("compiling"):
        assert run.later(0.9 * TIMEOUT) is None
        assert run.later(0.1 * TIMEOUT, 1) is None
        assert run.later(0.9 * TIMEOUT) is None
        assert run.later(0.2 * TIMEOUT) == "compiling"


def test_work_counts_from_the_time_at_which_it_was_queued() -> None:
    run = Run()
    run.later(100 * TIMEOUT)
    run.queue("instruction 0")
    assert run.later(0.9 * TIMEOUT) is None
    assert run.later(0.2 * TIMEOUT) == "instruction 0"


def test_on_a_cpu_the_host_is_timed() -> None:
    """The time of an outer piece of work starts anew when a nested one ends."""
    run = Run(with_device=False)
    with run.progress.watching("outer"):
        run.later(0.9 * TIMEOUT)
        with run.progress.watching("inner"):
            assert run.later(0.9 * TIMEOUT) is None
            assert run.later(0.2 * TIMEOUT) == "inner"
        assert run.later(0.9 * TIMEOUT) is None
        assert run.later(0.2 * TIMEOUT) == "outer"
    assert run.later(100 * TIMEOUT) is None


def test_work_that_raises_is_not_watched_any_longer() -> None:
    run = Run()
    with pytest.raises(ValueError), run.progress.watching("failing"):
        raise ValueError
    assert run.device.recorded == 0 and run.later(100 * TIMEOUT) is None


def test_a_device_that_has_failed_is_left_to_its_host() -> None:
    run = Run()
    run.device.fails = True
    with run.queued_step(3):
        assert run.later(0.9 * TIMEOUT) is None
        assert run.later(1.2 * TIMEOUT) == "the loss"


def test_only_devices_with_a_queue_have_events(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(Event=device.event))
    with Watchdog(TIMEOUT, torch.device("cpu")).watching("work"):
        pass
    assert device.recorded == 0
    with Watchdog(TIMEOUT, torch.device("cuda")).watching("work"):
        pass
    assert device.recorded == 1


HANGS = """
import time, torch
from types import SimpleNamespace
from lime_dist.pipeline.watchdog import Watchdog

class Event:
    def record(self): pass
    def query(self): return False

torch.get_device_module = lambda _: SimpleNamespace(Event=Event)
watchdog = Watchdog(0.2, torch.device("cuda"))
with watchdog.watching("the loss"):
    with watchdog.watching("instruction 7"):
        pass
    time.sleep(100)
"""


def test_the_process_ends_with_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == STALLED_STATUS
    assert done.stderr == "error: instruction 7: no progress for 0.2 s (pipeline.timeout); ending the job\n"
