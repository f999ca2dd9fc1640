"""Transfers of payloads and gradients over a stage boundary: sends that do not block, and receives posted ahead.

With NCCL a posted receive is a kernel that occupies the device until the peer sends. Whatever waits for the whole device
meanwhile, such as the first launch of a kernel or an allocator that frees its cache, waits for the peer. So a stage may post a
receive only if nothing that it still has to do leads to the peer's send (`Schedule.receives_ahead`; tests/cuda).

Each direction of each boundary has a process group of its own with its two ranks. With NCCL the operations of a group run in
the order in which they were issued: in a shared group, a receive that is posted early would block later sends, also those
over other boundaries, and the pipeline would deadlock.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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
        waited: seconds that the host of this end waited for transfers. With NCCL it queues the wait for a receive and goes on.
    """

    bytes: int = 0
    transfers: int = 0
    waited: float = 0.0

    def add(self, num_bytes: int, waited: float) -> None:
        """Count one tensor."""
        self.bytes += num_bytes
        self.transfers += 1
        self.waited += waited


POLL_SECONDS = 1e-4
"""How often a host that waits for a send asks whether it has completed."""


@dataclass
class Sender:
    """The sending end of one direction. It holds each tensor until its send has completed.

    With NCCL, a host can ask whether a send has completed, and does so before each post. So a tensor is freed when nothing uses it
    any longer, and the allocator can give its memory away at once. (For tensors that are freed earlier, the allocator puts an event
    behind everything that has been queued for the communicator, also later sends, and waits for that.) Only if the window is
    full does the host wait, so that it does not run ahead of its device by more than the window: memory would be allocated for all
    payloads of the step. With gloo, the host learns that a send has completed only by waiting for it.

    Args:
        peer: global rank of the receiving end.
        is_queued: transfers are work in the queue of a device (NCCL).

    Attributes:
        window: tensors that may be under way at a time; another send first waits for the oldest.
        by_part: ``stats`` by part of this stage; the waits of `drain` count for the first.
    """

    peer: int
    group: dist.ProcessGroup
    is_queued: bool = False
    stats: TransferStats = field(default_factory=TransferStats)
    window: int = 1
    by_part: dict[int, TransferStats] = field(default_factory=partial(defaultdict, TransferStats))
    _under_way: deque[tuple[Any, Tensor]] = field(default_factory=deque)

    def post(self, tensor: Tensor, part: int = 0) -> None:
        """Send a contiguous tensor, which must not be written to afterwards. Returns at once unless the window is full.

        Args:
            part: of this stage, which the tensor comes from.
        """
        begin = time.perf_counter()
        self.release()
        while len(self._under_way) >= self.window:
            self._complete_oldest()
        waited = time.perf_counter() - begin
        self._under_way.append((dist.isend(tensor, self.peer, group=self.group), tensor))
        for stats in (self.stats, self.by_part[part]):
            stats.add(tensor.nbytes, waited)

    def release(self) -> None:
        """Free the tensors whose sends are known to have completed. Does not wait."""
        while self.is_queued and self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()

    def drain(self) -> None:
        """Let what follows come after all sends: the compute stream of the device, or the host where it has none."""
        begin = time.perf_counter()
        for work, _ in self._under_way:
            work.wait()
        if not self.is_queued:
            self._under_way.clear()
        waited = time.perf_counter() - begin
        for stats in (self.stats, self.by_part[0]):
            stats.waited += waited

    def _complete_oldest(self) -> None:
        """Let the host wait until the oldest send has completed, and free its tensor."""
        work, _ = self._under_way[0]
        if self.is_queued:
            while not work.is_completed():
                time.sleep(POLL_SECONDS)
        else:
            work.wait()
        self._under_way.popleft()


class WatchedReceive:
    """A receive over gloo that a host can ask whether it is over. gloo tells only a thread that waits for it."""

    def __init__(self, work: Any) -> None:
        self._over = threading.Event()
        self._error: Exception | None = None
        threading.Thread(target=self._wait, args=(work,), name="receive", daemon=True).start()

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except Exception as error:  # raised where the tensor is taken
            self._error = error
        finally:
            self._over.set()

    def is_completed(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        self._over.wait()
        if self._error is not None:
            raise self._error


@dataclass
class Receiver(Generic[T]):
    """The receiving end of one direction. Call ``begin``, then ``take`` once per announced tensor.

    Args:
        peer: global rank of the sending end.

    Attributes:
        by_part: ``stats`` by part of this stage.
    """

    peer: int
    group: dist.ProcessGroup
    stats: TransferStats = field(default_factory=TransferStats)
    by_part: dict[int, TransferStats] = field(default_factory=partial(defaultdict, TransferStats))
    _posted: deque[tuple[Any, Tensor, T]] = field(default_factory=deque)
    _ahead: deque[int] = field(default_factory=deque)
    _left: int = 0
    _meanwhile: Callable[[], bool] | None = None

    def begin(
        self,
        ahead: Sequence[int],
        allocate: Callable[[], tuple[Tensor, T]],
        meanwhile: Callable[[], bool] | None = None,
    ) -> None:
        """Announce tensors. The first ``take`` posts the first receive.

        Args:
            ahead: by tensor, receives that are posted beyond it when it is waited for.
            allocate: returns memory for the next tensor, and the object that the memory belongs to.
            meanwhile: does a short piece of other work, and returns whether there was any; called again and again while ``take``
                would wait. For tensors in host memory only: a host that queues work for a device does not know what it waits for.
        """
        self._ahead = deque(ahead)
        self._left, self._allocate, self._meanwhile = len(ahead), allocate, meanwhile

    def take(self, part: int = 0) -> tuple[Tensor, T]:
        """Wait for the next tensor, for a part of this stage, and return it with its owner. The tensors after it can arrive
        meanwhile."""
        ahead = self._ahead.popleft()
        while self._left and len(self._posted) < 1 + ahead:
            memory, belongs_to = self._allocate()
            work = dist.irecv(memory, self.peer, group=self.group)
            self._posted.append((work if self._meanwhile is None else WatchedReceive(work), memory, belongs_to))
            self._left -= 1
        work, tensor, owner = self._posted.popleft()
        while self._meanwhile is not None and not work.is_completed() and self._meanwhile():
            pass
        begin = time.perf_counter()
        work.wait()
        waited = time.perf_counter() - begin
        for stats in (self.stats, self.by_part[part]):
            stats.add(tensor.nbytes, waited)
        return tensor, owner
