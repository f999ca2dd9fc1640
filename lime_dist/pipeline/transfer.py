"""Transfers of payloads and gradients over a stage boundary: sends that do not block, and receives posted ahead.

With NCCL a posted receive is a kernel that occupies the device until the peer sends. Whatever waits for the whole device
meanwhile, such as the first launch of a kernel or an allocator that frees its cache, waits for the peer. So a stage may post a
receive only if nothing that it still has to do leads to the peer's send (`Schedule.receives_ahead`; tests/cuda).

Each direction of each boundary has a process group of its own with its two ranks. With NCCL the operations of a group run in
the order in which they were issued: in a shared group, a receive that is posted early would block later sends, also those
over other boundaries, and the pipeline would deadlock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass
class TransferStats:
    """What crossed a boundary in one direction, as one end counts it.

    Attributes:
        bytes: of tensors.
        transfers: number of tensors.
        waited: seconds that this end waited for transfers. On a GPU the host queues a wait and goes on, so that it counts 0.
    """

    bytes: int = 0
    transfers: int = 0
    waited: float = 0.0


@dataclass
class Sender:
    """The sending end of one direction.

    Args:
        peer: global rank of the receiving end.

    Attributes:
        window: tensors that may be under way at a time; another send first waits for the oldest. (gloo frees a tensor only
            once its send has been waited for.)
    """

    peer: int
    group: dist.ProcessGroup
    stats: TransferStats = field(default_factory=TransferStats)
    window: int = 1
    _under_way: deque[tuple[Any, Tensor]] = field(default_factory=deque)

    def post(self, tensor: Tensor) -> None:
        """Send a contiguous tensor, which must not be written to afterwards. Returns at once unless the window is full."""
        begin = time.perf_counter()
        while len(self._under_way) >= self.window:
            self._under_way.popleft()[0].wait()
        self.stats.waited += time.perf_counter() - begin
        self._under_way.append((dist.isend(tensor, self.peer, group=self.group), tensor))
        self.stats.bytes += tensor.nbytes
        self.stats.transfers += 1

    def drain(self) -> None:
        """Wait until all sends have completed."""
        begin = time.perf_counter()
        while self._under_way:
            self._under_way.popleft()[0].wait()
        self.stats.waited += time.perf_counter() - begin


@dataclass
class Receiver(Generic[T]):
    """The receiving end of one direction. Call ``begin``, then ``take`` once per announced tensor.

    Args:
        peer: global rank of the sending end.
    """

    peer: int
    group: dist.ProcessGroup
    stats: TransferStats = field(default_factory=TransferStats)
    _posted: deque[tuple[Any, Tensor, T]] = field(default_factory=deque)
    _left: int = 0

    def begin(self, count: int, ahead: int, allocate: Callable[[], tuple[Tensor, T]]) -> None:
        """Announce ``count`` tensors. The first ``take`` posts the first receive.

        Args:
            ahead: receives that are posted beyond the one that is waited for.
            allocate: returns memory for the next tensor, and the object that the memory belongs to.
        """
        self._left, self._ahead, self._allocate = count, ahead, allocate

    def take(self) -> tuple[Tensor, T]:
        """Wait for the next tensor and return it with its owner. The tensors after it can arrive meanwhile."""
        while self._left and len(self._posted) < 1 + self._ahead:
            memory, belongs_to = self._allocate()
            self._posted.append((dist.irecv(memory, self.peer, group=self.group), memory, belongs_to))
            self._left -= 1
        work, tensor, owner = self._posted.popleft()
        begin = time.perf_counter()
        work.wait()
        self.stats.waited += time.perf_counter() - begin
        self.stats.bytes += tensor.nbytes
        self.stats.transfers += 1
        return tensor, owner
