"""Where a rank's time goes: seconds by kind of work, on the device that does it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

COMPUTATION, TRANSFER, WAITING, DATA = "computation", "transfer", "waiting", "data"
CHECKPOINT, VALIDATION = "checkpoint", "validation"
KINDS = (COMPUTATION, TRANSFER, WAITING, DATA, CHECKPOINT, VALIDATION)
"""computation: forward, backward, update. transfer: sending, and adding gradients up over replicas and ties. waiting:
receiving, and agreeing on gradient norm and loss: until another stage has got so far. data: reading and copying batches."""

INSTRUCTIONS = {
    "ForwardPass": COMPUTATION,
    "BackwardPass": COMPUTATION,
    "OptimizerStep": COMPUTATION,
    "SendActivation": TRANSFER,
    "SendGrad": TRANSFER,
    "ReduceGrads": TRANSFER,
    "ReduceTiedGrads": TRANSFER,
    "RecvActivation": WAITING,
    "RecvGrad": WAITING,
    "LoadMicroBatch": DATA,
}
"""Kind of a schedule's instruction, by its class."""


class Clock:
    """Adds up seconds by kind. On a GPU, where work is queued, it marks the queue: what is counted is when the device got there.

    Work within other work is counted as its own kind alone, but for a validation, to which all within it belongs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind: str | None = None
        self._marks: list[tuple[Any, str | None]] = []  # a time or an event, and what began with it

    @contextmanager
    def measuring(self, kind: str) -> Iterator[None]:
        before = self._kind
        if before == VALIDATION:
            yield
            return
        self._mark(kind)
        try:
            yield
        finally:
            self._mark(before)

    def _mark(self, kind: str | None) -> None:
        now: Any = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((now, kind))
        self._kind = kind

    def totals(self) -> dict[str, float]:
        """Seconds by kind since the clock was made; waits until the device has done what was queued."""
        if self._cuda and self._marks:
            self._marks[-1][0].synchronize()
        for (begin, kind), (end, _) in pairwise(self._marks):
            if kind is not None:
                self._seconds[kind] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        del self._marks[:-1]
        return dict(self._seconds)
