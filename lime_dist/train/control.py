"""What the ranks agree on after every step: one small all-reduce over the CPU, whatever carries payloads and gradients.

It has a gloo group of its own, so that it neither waits for a GPU nor mixes with other transfers. (Between hosts gloo takes
the network interface that the host's name resolves to, or ``GLOO_SOCKET_IFNAME``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Word:
    """What one rank says.

    Attributes:
        stop: the signal that asks this process to end, 0 if none has come.
        writing: its part of a checkpoint is not on disk yet.
        trouble: it cannot go on.
        spike: the loss has jumped.
        checksum: of the tokens that it read in this step, below 2³²; None on stages that read none.
    """

    stop: int = 0
    writing: bool = False
    trouble: bool = False
    spike: bool = False
    checksum: int | None = None


@dataclass(frozen=True)
class Agreed:
    """What all say together: the greatest ``stop``, whether anybody is ``writing``, …, and the replicas whose first and last
    stage read different tokens."""

    stop: int
    writing: bool
    trouble: bool
    spike: bool
    different: tuple[int, ...]


class Control:
    """The ranks' common word; made by all of them together.

    Args:
        replica: this rank's, of ``replicas``.
        is_first, is_last: whether this rank is the first, or the last, stage of its replica.
        timeout: ``pipeline.timeout``; the watchdog, which knows more, speaks before the group's own patience ends.
    """

    def __init__(self, replica: int, replicas: int, is_first: bool, is_last: bool, timeout: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * timeout + 60))
        self._replicas = replicas
        self._places = [
            4 + end * replicas + replica for end, is_it in enumerate((is_first, is_last)) if is_it
        ]  # of checksums: all first stages', then all last stages'

    def exchange(self, own: Word) -> Agreed:
        """All ranks say their word and hear everybody's; called by all together."""
        words = torch.zeros(4 + 2 * self._replicas, dtype=torch.int64)
        words[:4] = torch.tensor([own.stop, own.writing, own.trouble, own.spike])
        if own.checksum is not None:
            words[self._places] = own.checksum
        dist.all_reduce(words, dist.ReduceOp.MAX, group=self._group)
        stop, writing, trouble, spike, *checksums = words.tolist()
        pairs = zip(checksums[: self._replicas], checksums[self._replicas :], strict=True)
        different = tuple(replica for replica, (first, last) in enumerate(pairs) if first != last)
        return Agreed(stop, bool(writing), bool(trouble), bool(spike), different)

    def gather(self, own: T) -> list[T]:
        """What every rank hands over, by rank, on rank 0; empty on the others. Called by all together."""
        found: list[T] | None = [own] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, found, dst=0, group=self._group)
        return found or []
