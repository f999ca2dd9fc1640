"""The layer history: who reads which entry, where entries lie, and the buffer they live in.

Static part (`HistoryPolicy`, `StageLayout`): a policy says only which entries a layer reads. What is alive at a boundary,
where an entry lies and which layers read it are derived from that in one place.

Moving part (`LayerHistory`): one buffer per micro-batch holds every entry once; layers write their slot into it and read
from it in place, so L layers cost O(L) memory, not the O(L²) of a fresh concatenation per layer. The two kinds of route
are `key_value_history.py` and `hidden_history.py`.

Order between writers and readers is explicit: every operation takes a token (a scalar of the autograd graph) from the
one before, so that autograd runs them in exactly the reverse order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from lime_dist.config.schema import LimeConfig

BLOCK = 8
"""Consecutive layers whose reads of older entries are one product."""


class HistoryPolicy(Protocol):
    """Which slots a layer mixes."""

    def reads(self, layer: int) -> Sequence[int]:
        """The slots that layer ``layer`` mixes: ascending, unique, its own (``layer``) last."""


@dataclass(frozen=True)
class FullHistory:
    """Every layer from ``start_layer`` on reads every earlier one: the paper's model."""

    start_layer: int = 1

    def reads(self, layer: int) -> Sequence[int]:
        return range(layer + 1) if layer >= self.start_layer else (layer,)


def make_policy(config: LimeConfig) -> HistoryPolicy:
    """The policy that a configuration names."""
    return {"full": FullHistory}[config.history.policy](config.start_layer)


def live_slots(policy: HistoryPolicy, boundary: int, num_layers: int) -> tuple[int, ...]:
    """live(b): the slots that exist before layer ``boundary`` and that some layer ≥ ``boundary`` reads, ascending."""
    wanted = {slot for layer in range(boundary, num_layers) for slot in policy.reads(layer)}
    return tuple(slot for slot in range(boundary) if slot in wanted)


@dataclass(frozen=True)
class StageLayout:
    """Where a stage that holds layers ``start`` … ``stop``−1 keeps its entries.

    Received entries lie first, in the order in which they crossed the boundary; then the stage's own, as written.
    A *position* counts entries in the buffer; a *row* counts the stage's own layers.
    """

    policy: HistoryPolicy
    start: int
    stop: int
    num_layers: int

    @cached_property
    def received(self) -> tuple[int, ...]:
        return live_slots(self.policy, self.start, self.num_layers)

    @cached_property
    def sent(self) -> tuple[int, ...]:
        return live_slots(self.policy, self.stop, self.num_layers)

    @property
    def num_positions(self) -> int:
        return len(self.received) + self.stop - self.start

    def position(self, slot: int) -> int:
        if slot >= self.start:
            return len(self.received) + slot - self.start
        return self.received.index(slot)

    def block(self, layer: int) -> range:
        """The block of layers that ``layer`` belongs to."""
        first = layer - (layer - self.start) % BLOCK
        return range(first, min(first + BLOCK, self.stop))

    def read_positions(self, layer: int) -> list[int]:
        return [self.position(slot) for slot in self.policy.reads(layer)]

    @cached_property
    def runs_by_layer(self) -> dict[int, list[slice]]:
        return {layer: _runs(self.read_positions(layer)) for layer in range(self.start, self.stop)}

    @cached_property
    def older_runs(self) -> dict[int, list[slice]]:
        """By a block's first layer: the positions older than the block that some layer of it reads."""
        found = {}
        for first in range(self.start, self.stop, BLOCK):
            begin = self.position(first)
            read = {p for layer in self.block(first) for p in self.read_positions(layer) if p < begin}
            found[first] = _runs(sorted(read))
        return found

    @cached_property
    def newer_runs(self) -> dict[int, list[slice]]:
        """By a block's first layer: the rows of newer layers that read some entry of the block."""
        found = {}
        for first in range(self.start, self.stop, BLOCK):
            own = {self.position(layer) for layer in self.block(first)}
            rows = [
                layer - self.start
                for layer in range(self.block(first).stop, self.stop)
                if own & set(self.read_positions(layer))
            ]
            found[first] = _runs(rows)
        return found


def _runs(numbers: Sequence[int]) -> list[slice]:
    """Ascending numbers as maximal contiguous slices."""
    runs: list[slice] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = slice(runs[-1].start, number + 1)
        else:
            runs.append(slice(number, number + 1))
    return runs


class LayerHistory:
    """The history of one micro-batch on one stage; what both kinds of route share.

    Attributes:
        entries: [positions, *slot_shape]: every entry that this stage holds, received ones first.
        token: the scalar that orders the operations on this history in the autograd graph.
        incoming: the gradient that came back over the next boundary, [entries sent, *slot_shape]; None if nothing crossed.

    Backward may be walked once; ``keep=True`` costs memory and allows it many times (gradient checkers do that).
    """

    def __init__(
        self,
        layout: StageLayout,
        slot_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        keep: bool = False,
    ) -> None:
        self.layout, self.slot_shape = layout, slot_shape
        self.entries = torch.empty((layout.num_positions, *slot_shape), dtype=dtype, device=device)
        self.token = torch.zeros((), dtype=dtype, device=device)
        self.incoming: Tensor | None = None
        self.is_recomputing = False
        self._written = len(layout.received)
        self._keep = keep
        self._visited: set[int] = set()

    def release_token(self) -> Tensor:
        """Hand the token over when the last layer has run. The autograd graph holds the history; a history that held on to
        the graph would close a circle that Python's collector cannot see, and neither would ever be freed."""
        token, self.token = self.token, self.token.detach()
        return token

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Within, layers run again for activation checkpointing: slots are read, never rewritten."""
        self.is_recomputing = True
        try:
            yield
        finally:
            self.is_recomputing = False

    def received_gradient(self) -> Tensor:
        """[entries received, *slot_shape]: the gradient to send back over the boundary before this stage."""
        raise NotImplementedError

    def _claim(self, layer: int) -> Tensor | None:
        """The place that a layer's slot is to be written to, once, in turn; None while recomputing.

        Raises:
            RuntimeError: it is not this layer's turn.
        """
        if self.is_recomputing:
            return None
        position = self.layout.position(layer)
        if position != self._written:
            raise RuntimeError(f"layer {layer} wrote its slot out of turn: {self._written} of the entries are there")
        self._written += 1
        return self.entries[position]

    def _visit_once(self, layer: int) -> None:
        if layer in self._visited and not self._keep:
            raise RuntimeError(
                "a layer history can be walked backwards once: it gives its memory away while it is walked"
            )
        self._visited.add(layer)

    def _incoming_gradient(self, slots: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A fresh [slots, *slot_shape] with what came back over the next boundary, 0 for what did not cross."""
        total = self.entries.new_zeros((len(slots), *self.slot_shape), dtype=dtype)
        if self.incoming is not None:
            for index, slot in enumerate(slots):
                if slot in self.layout.sent:
                    total[index] = self.incoming[self.layout.sent.index(slot)]
        return total
