"""Payloads and gradients on their way over a stage boundary, each direction on its own: sends that do not block, receives
that are posted before they are needed.

Each direction of each boundary has a process group of its two ranks: with NCCL the operations of a group run in the order in
which they were issued, and an early receive would hold up a send, over another boundary too, for ever.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch import Tensor

from lime_dist.pipeline.in_flight import AHEAD

T = TypeVar("T")


@dataclass
class Traffic:
    """What crossed a boundary in one direction, seen from one end.

    Attributes:
        bytes: of tensors.
        transfers: how many.
        waited: seconds that this end waited for transfers. On a GPU a wait is queued, not waited for, and does not show.
    """

    bytes: int = 0
    transfers: int = 0
    waited: float = 0.0


@dataclass
class Sender:
    """One direction, the end that sends.

    Args:
        peer: global rank of the other end.

    Attributes:
        window: tensors that may be under way at a time; one more waits for the oldest. (gloo says that a send has ended
            only to those who wait for it, so that memory is given back no sooner.)
    """

    peer: int
    group: dist.ProcessGroup
    traffic: Traffic = field(default_factory=Traffic)
    window: int = 1 + AHEAD
    _under_way: deque[tuple[Any, Tensor]] = field(default_factory=deque)

    def post(self, tensor: Tensor) -> None:
        """Send a contiguous tensor, which nobody may write to any more; returns at once unless the window is full."""
        begin = time.perf_counter()
        while len(self._under_way) >= self.window:
            self._under_way.popleft()[0].wait()
        self.traffic.waited += time.perf_counter() - begin
        self._under_way.append((dist.isend(tensor, self.peer, group=self.group), tensor))
        self.traffic.bytes += tensor.nbytes
        self.traffic.transfers += 1

    def drain(self) -> None:
        """Wait until everything has left."""
        begin = time.perf_counter()
        while self._under_way:
            self._under_way.popleft()[0].wait()
        self.traffic.waited += time.perf_counter() - begin


@dataclass
class Receiver(Generic[T]):
    """One direction, the end that receives.

    Use: ``begin``, then ``take`` as often as announced.
    """

    peer: int
    group: dist.ProcessGroup
    traffic: Traffic = field(default_factory=Traffic)
    _posted: deque[tuple[Any, Tensor, T]] = field(default_factory=deque)
    _left: int = 0

    def begin(self, count: int, allocate: Callable[[], tuple[Tensor, T]]) -> None:
        """Announce ``count`` tensors and post the first receive.

        Args:
            allocate: gives the memory of the next one, and what it belongs to.
        """
        self._left, self._allocate = count, allocate
        self._post(1)

    def _post(self, most: int) -> None:
        while self._left and len(self._posted) < most:
            tensor, owner = self._allocate()
            self._posted.append((dist.irecv(tensor, self.peer, group=self.group), tensor, owner))
            self._left -= 1

    def take(self) -> tuple[Tensor, T]:
        """The next tensor, once it is there; the one after it can come meanwhile."""
        self._post(1 + AHEAD)
        work, tensor, owner = self._posted.popleft()
        begin = time.perf_counter()
        work.wait()
        self.traffic.waited += time.perf_counter() - begin
        self.traffic.bytes += tensor.nbytes
        self.traffic.transfers += 1
        return tensor, owner
