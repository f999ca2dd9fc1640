"""What the replicas of a stage exchange: sums of gradients, updated weights, and states for checkpoints, piece by piece.

With ZeRO 0 a piece is summed for every replica. With ZeRO 1 each replica receives the sum of its slice, and every replica gathers the
slices of weights: over NCCL one reduce-scatter and one all-gather a piece. gloo's take two and four times as long as a reduction to,
and a broadcast from, the owner of each slice (`benchmarks/reduction_cost.py`), so it gets those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lime_dist.pipeline.flat_layout import FlatLayout


def reduce_scatter() -> Any:
    """torch's reduce-scatter of one tensor to equal slices, ``(output, input, op, group, async_op)``. torch 2.13 has renamed it."""
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather() -> Any:
    """torch's all-gather of equal slices into one tensor, ``(output, input, group, async_op)``. torch 2.13 has renamed it."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class ExchangeStats:
    """What a replica has handed to collectives.

    Attributes:
        calls: of collectives, without those for checkpoints.
        gradient_bytes: of gradients that they summed.
        weight_bytes: of weights that they gathered.
    """

    calls: int = 0
    gradient_bytes: int = 0
    weight_bytes: int = 0


class Replicas:
    """The exchange of one stage with its replicas. All of them call every method together, with the same piece.

    Args:
        group: the ranks that hold the stage.
        layout: of its flat buffers.
    """

    def __init__(self, group: dist.ProcessGroup, layout: FlatLayout) -> None:
        self.stats = ExchangeStats()
        self.group, self._layout = group, layout
        self.count = dist.get_world_size(group)
        self.own = dist.get_rank(group) if layout.owners > 1 else 0
        self._by_slice = dist.get_backend(group) == dist.Backend.GLOO
        self._calls = layout.owners if self._by_slice else 1  # for a piece
        self._under_way: list[Any] = []

    def start_sum(self, flat: Tensor, piece: range) -> None:
        """Start to sum a piece of the gradients. `finish_sums` must follow."""
        part = flat[piece.start : piece.stop]
        self.stats.gradient_bytes += part.nbytes
        self.stats.calls += self._calls
        if self._layout.owners == 1:
            self._start(dist.all_reduce, part)
        elif self._by_slice:
            for owner, elements in self._slices(piece):
                target = dist.get_global_rank(self.group, owner)
                self._start(dist.reduce, flat[elements.start : elements.stop], target)
        else:
            self._start(reduce_scatter(), self._own_slice(flat, piece), part)

    def finish_sums(self) -> None:
        """Let what follows come after all sums."""
        self._finish()

    def gather(self, flat: Tensor) -> None:
        """Give every replica all weights, whose slices lie in place on their owners."""
        for piece in self._layout.pieces:
            self.stats.weight_bytes += flat[piece.start : piece.stop].nbytes
            self.stats.calls += self._calls
            self._start_gathering(flat, piece)
        self._finish()

    def gather_piece(self, own: Tensor) -> Tensor:
        """A piece from the slices of all replicas.

        Args:
            own: the slice of this replica.
        """
        piece = range(len(own) * self._layout.owners)
        flat = own.new_empty(len(piece))
        self._own_slice(flat, piece).copy_(own)
        self._start_gathering(flat, piece)
        self._finish()
        return flat

    def _start_gathering(self, flat: Tensor, piece: range) -> None:
        if self._by_slice:
            for owner, elements in self._slices(piece):
                source = dist.get_global_rank(self.group, owner)
                self._start(dist.broadcast, flat[elements.start : elements.stop], source)
        else:
            self._start(all_gather(), flat[piece.start : piece.stop], self._own_slice(flat, piece))

    def _slices(self, piece: range) -> list[tuple[int, range]]:
        return [(owner, self._layout.slice(piece, owner)) for owner in range(self._layout.owners)]

    def _own_slice(self, flat: Tensor, piece: range) -> Tensor:
        elements = self._layout.slice(piece, self.own)
        return flat[elements.start : elements.stop]

    def _start(self, collective: Callable[..., Any], *arguments: Any) -> None:
        self._under_way.append(collective(*arguments, group=self.group, async_op=True))

    def _finish(self) -> None:
        for work in self._under_way:
            work.wait()
        self._under_way.clear()
