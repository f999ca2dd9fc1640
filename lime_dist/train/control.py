"""The status that all ranks exchange after every step: one small all-reduce over the CPU.

It has its own gloo process group, so that it neither waits for the GPU nor mixes with other transfers.
(Between hosts, gloo uses the network interface that the host's name resolves to, or ``GLOO_SOCKET_IFNAME``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from lime_dist.distributed import group_timeout

T = TypeVar("T")


@dataclass(frozen=True)
class Status:
    """What one rank reports after a step.

    Attributes:
        stop: the signal that asks this process to stop; 0: none.
        writing: this rank's part of a checkpoint is still being written.
        failed: this rank cannot continue.
        spike: the loss has jumped.
        checksum: of the tokens that this rank read in the step, below 2³²; None on stages that read no data.
    """

    stop: int = 0
    writing: bool = False
    failed: bool = False
    spike: bool = False
    checksum: int | None = None


@dataclass(frozen=True)
class JointStatus:
    """The status of all ranks together.

    Attributes:
        stop: the largest ``stop`` of any rank.
        writing, failed, spike: whether any rank reported it.
        different_replicas: the replicas of which two stages read different tokens.
    """

    stop: int
    writing: bool
    failed: bool
    spike: bool
    different_replicas: tuple[int, ...]


class Control:
    """Exchanges the status of all ranks. All ranks construct it together.

    Args:
        replica: index of this rank's replica, of ``replicas``.
        stage: this rank's stage, of ``stages``.
        timeout: ``pipeline.timeout`` in seconds.
    """

    def __init__(self, replica: int, replicas: int, stage: int, stages: int, timeout: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=group_timeout(timeout))
        self._replicas, self._stages, self._index = replicas, stages, 4 + replica * stages + stage

    def exchange(self, own: Status) -> JointStatus:
        """Combine the status of all ranks; all ranks must call it."""
        values = torch.full((4 + self._replicas * self._stages,), -1, dtype=torch.int64)
        values[:4] = torch.tensor([own.stop, own.writing, own.failed, own.spike])
        if own.checksum is not None:
            values[self._index] = own.checksum
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        stop, writing, failed, spike, *checksums = values.tolist()
        by_replica = (checksums[begin : begin + self._stages] for begin in range(0, len(checksums), self._stages))
        different = tuple(index for index, read in enumerate(by_replica) if len(set(read) - {-1}) > 1)
        return JointStatus(stop, bool(writing), bool(failed), bool(spike), different)

    def gather(self, own: T) -> list[T]:
        """The values of all ranks, in rank order, on rank 0; empty on the others. All ranks must call it."""
        gathered: list[T] | None = [own] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, gathered, dst=0, group=self._group)
        return gathered or []
