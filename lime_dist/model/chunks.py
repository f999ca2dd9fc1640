"""The chunks of layers that a policy summarises."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lime_dist.model.policies import Entry, HistoryPolicy


@dataclass(frozen=True)
class Chunk:
    """Layers whose summary some layer reads: U_m = A_m·[slots of the layers], ``num_rows`` rows."""

    index: int
    layers: range
    num_rows: int

    @property
    def sources(self) -> list[Entry]:
        return [Entry(layer) for layer in self.layers]

    @property
    def rows(self) -> list[Entry]:
        return [Entry(self.layers[-1], True, row, len(self.layers)) for row in range(self.num_rows)]


@lru_cache(maxsize=64)
def summarised_chunks(policy: HistoryPolicy, num_layers: int) -> tuple[Chunk, ...]:
    """The chunks whose summary some layer reads, ascending."""
    read = {entry for layer in range(num_layers) for entry in policy.reads(layer) if entry.is_summary}
    num_rows = {entry.layers: max(e.row for e in read if e.layers == entry.layers) + 1 for entry in read}
    ranges = sorted(num_rows, key=lambda layers: layers.start)
    return tuple(Chunk(index, layers, num_rows[layers]) for index, layers in enumerate(ranges))
