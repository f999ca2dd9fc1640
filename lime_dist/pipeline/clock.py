"""Measure where a rank's time goes: seconds by kind of work, as the device spends them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

COMPUTATION, TRANSFER, WAITING, DATA = "computation", "transfer", "waiting", "data"
CHECKPOINT, VALIDATION = "checkpoint", "validation"
KINDS = (COMPUTATION, TRANSFER, WAITING, DATA, CHECKPOINT, VALIDATION)
"""Kinds of work.

computation: forward and backward passes and the update. transfer: sends, and the reduction of gradients over replicas and tied
weights. waiting: receives, and the exchange of gradient norm and loss, which wait for other stages. data: reading and copying
batches. checkpoint and validation: all work within them."""

INSTRUCTIONS = {
    "ForwardPass": COMPUTATION,
    "BackwardPass": COMPUTATION,
    "BackwardInput": COMPUTATION,
    "BackwardWeight": COMPUTATION,
    "OptimizerStep": COMPUTATION,
    "SendActivation": TRANSFER,
    "SendGrad": TRANSFER,
    "ReduceGrads": TRANSFER,
    "ReduceTiedGrads": TRANSFER,
    "RecvActivation": WAITING,
    "RecvGrad": WAITING,
    "LoadMicroBatch": DATA,
}
"""Kind of work by kind of instruction (`lime_dist.pipeline.schedules.base`)."""


class Clock:
    """Adds up seconds by kind of work.

    On a GPU, where work is queued, it records events in the queue and counts the time between them on the device.

    Nested work counts as its own kind only. Work within a validation counts as validation.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = None if device.type == "cpu" else torch.get_device_module(device).Event
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind: str | None = None
        self._marks: deque[tuple[Any, str | None]] = deque()  # a time or an event, and the kind that began there

    @contextmanager
    def measuring(self, kind: str) -> Iterator[None]:
        """Count the time within as ``kind``."""
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
        if self._event is not None:
            now = self._event(enable_timing=True)
            now.record()
        self._marks.append((now, kind))
        self._kind = kind

    def totals(self) -> dict[str, float]:
        """Seconds by kind since the clock was made, as far as the device has come. It does not wait for the device."""
        while len(self._marks) > 1 and (self._event is None or self._marks[1][0].query()):
            (begin, kind), (end, _) = self._marks.popleft(), self._marks[0]
            if kind is not None:
                self._seconds[kind] += end - begin if self._event is None else begin.elapsed_time(end) / 1e3
        return dict(self._seconds)
