"""A model of NCCL: which of the operations that all stages queue on their devices have to happen before which.

· A stage's device has a compute stream, and a stream per communicator. Work on a stream runs in the order in which it was queued.
· A transfer is a kernel on its communicator's stream. It starts once the compute stream has done what was queued before the
  transfer, and occupies the device until all its ends have started.
· A wait for a transfer is work on the compute stream, and the host goes on. The host itself waits where it reads a value, until
  the compute stream is done, where it waits for its whole device, until all streams are done, and where it blocks on one transfer.
· A device is as late as it can be: a transfer counts as completed only once its host has blocked on it.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

COMPUTE = "compute"
"""Name of the compute stream. The others have the names of their communicators."""

LAUNCHES = ("forward", "backward", "weights", "update")
"""Kinds of operations that launch kernels of the model or the optimizer."""


class Operation(NamedTuple):
    """What the host of a stage queues on its device.

    Attributes:
        kind: forward, backward, weights, update, read (a value that the host waits for), send, receive, reduce, wait or block (for a
            transfer; the compute stream waits, the host blocks).
        stream: that it is queued on.
        ends: number of stages that take part in it.
        awaited: of a wait or a block, the index of its transfer among the stage's operations.
    """

    kind: str
    stream: str = COMPUTE
    ends: int = 1
    awaited: int | None = None


class Transfer:
    """What ``torch.distributed.isend`` and ``irecv`` return."""

    def __init__(self, program: Program, index: int) -> None:
        self._program, self._index = program, index
        self._asked: int | None = None  # length of the program when the host last asked

    def wait(self) -> None:
        self._program.append(Operation("wait", awaited=self._index))

    def is_completed(self) -> bool:
        """A host that asks twice and does nothing in between blocks until it is."""
        blocks = self._asked == len(self._program)
        self._asked = len(self._program)
        if blocks:
            self._program.append(Operation("block", awaited=self._index))
        return blocks


class Program(list[Operation]):
    """The operations of one stage, in the order in which its host queues them.

    Attributes:
        freed: by index of a send, the number of operations that had been queued when its tensor was freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.freed: dict[int, int] = {}

    def compute(self, *kinds: str) -> None:
        self.extend(map(Operation, kinds))

    def transfer(self, kind: str, stream: str, ends: int, tensor: Any = None) -> Transfer:
        """Queue a transfer, and note when a sent tensor is freed."""
        index = len(self)
        self.append(Operation(kind, stream, ends))
        if tensor is not None:
            weakref.finalize(tensor, lambda: self.freed.setdefault(index, len(self)))
        return Transfer(self, index)


class Place(NamedTuple):
    """A host operation of a stage."""

    stage: int
    index: int
    kind: str


def places(programs: Sequence[Program]) -> list[Place]:
    return [Place(stage, i, each.kind) for stage, program in enumerate(programs) for i, each in enumerate(program)]


def first_of_each_kind(programs: Sequence[Program]) -> set[Place]:
    """On every stage the first operation of each kind."""
    return set({(place.stage, place.kind): place for place in reversed(places(programs))}.values())


class Graph:
    """What must have happened before what. An operation has three nodes: the host queues it, it starts, and it is done.

    Args:
        programs: by stage.
        waits: whether the host waits for its whole device before an operation.
        one_queue: operations of a device start in the order in which they were queued, whatever their streams
            (``CUDA_DEVICE_MAX_CONNECTIONS=1``).
    """

    def __init__(
        self, programs: Sequence[Program], waits: Callable[[Place], bool] = lambda _: False, one_queue: bool = False
    ) -> None:
        self.programs = programs
        self.places = places(programs)
        self.before: list[list[int]] = [[] for _ in range(3 * len(self.places))]
        starts: dict[tuple[str, int, int], list[int]] = defaultdict(list)
        last: dict[str, int] = {}  # by stream, the node at which its last operation is done
        for number, place in enumerate(self.places):
            queued, start, done = range(3 * number, 3 * number + 3)
            operation = programs[place.stage][place.index]
            self.before[start].append(queued)
            self.before[done].append(start)
            if place.index == 0:
                last, first, transfers = {}, queued, Counter[str]()
            else:
                is_over = programs[place.stage][place.index - 1].kind in ("read", "block")
                self.before[queued].append(done - 3 if is_over else queued - 3)
                self.before[start] += [start - 3] if one_queue else []
            if waits(place):
                self.before[queued] += last.values()
            if operation.kind != "block":
                self.before[start] += [last[stream] for stream in {operation.stream, COMPUTE} & last.keys()]
            if operation.awaited is not None:
                self.before[start].append(first + 3 * operation.awaited + 2)
            if operation.stream != COMPUTE:
                starts[operation.stream, transfers[operation.stream], operation.ends].append(start)
                transfers[operation.stream] += 1
            if operation.kind != "block":
                last[operation.stream] = done
        for (stream, _, number), ends in starts.items():
            assert len(ends) == number, f"{stream}: a transfer has {len(ends)} ends instead of {number}"
            for start in ends:
                self.before[start + 1] += ends

    def order(self) -> list[int]:
        """Nodes in an order in which they can happen, as far as they can."""
        after: list[list[int]] = [[] for _ in self.before]
        for node, before in enumerate(self.before):
            for each in before:
                after[each].append(node)
        left = [len(before) for before in self.before]
        order = [node for node, count in enumerate(left) if not count]
        for node in order:
            for each in after[node]:
                left[each] -= 1
                if not left[each]:
                    order.append(each)
        return order

    def deadlocks(self) -> bool:
        return len(self.order()) < len(self.before)

    def freed_too_early(self) -> list[Place]:
        """Sends whose tensors are freed while they may still be read: a later operation of the stage, which may write to the memory,
        does not come after them."""
        first = np.cumsum([0, *map(len, self.programs)])
        sends = [(stage, send, at) for stage, each in enumerate(self.programs) for send, at in each.freed.items()]
        number = {3 * (first[stage] + send) + 2: count for count, (stage, send, _) in enumerate(sends)}
        is_after = np.zeros((len(self.before), len(sends)), bool)
        for node in self.order():
            if self.before[node]:
                is_after[node] = is_after[self.before[node]].any(0)
            if node in number:
                is_after[node, number[node]] = True
        return [
            Place(stage, send, "send")
            for count, (stage, send, at) in enumerate(sends)
            if not is_after[3 * (first[stage] + at) + 1 : 3 * first[stage + 1] : 3, count].all()
        ]

    def single_deadlocks(self) -> list[Place]:
        """Places at which the host must not wait for its whole device, if it does so at this place only.

        A wait at place i lets what is queued at i or later happen after all that was queued before i. So it deadlocks if something
        queued before i is done only after its own host has queued the operation at i or a later one. For every node and stage
        this finds the last operation that must have been queued by then.
        """
        order = self.order()
        assert len(order) == len(self.before), "deadlocks without any wait"
        latest = np.full((len(order), len(self.programs)), -1)
        found: set[Place] = set()
        for node in order:
            place, is_queued = self.places[node // 3], node % 3 == 0
            if self.before[node]:
                latest[node] = latest[self.before[node]].max(0)
            if is_queued:
                latest[node, place.stage] = place.index
            for number in range(node // 3 + 1, node // 3 + 1 + latest[node, place.stage] - place.index):
                found.add(self.places[number])
        return sorted(found)
