"""Positions in a stage's buffer, and what reads them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Places:
    """Positions, ascending, and the maximal contiguous runs that they form."""

    positions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positions)

    def index_of(self, position: int) -> int:
        """The index of one of the positions."""
        return self.positions.index(position)

    @cached_property
    def runs(self) -> list[slice]:
        return contiguous_runs(self.positions)


@dataclass(frozen=True)
class Block:
    """What the layers of a block have in common, so that it is one product for all of them. A single layer has nothing in
    common.

    Attributes:
        own: positions of the layers' slots.
        older: positions of the entries older than the block that every layer of it reads.
        readers: positions of the newer readers that read every slot of the block.
    """

    layers: range
    own: Places
    older: Places
    readers: Places


@dataclass(frozen=True)
class Reader:
    """What mixes entries: a layer (one row) or a chunk's summary (``num_rows`` rows), on this stage or on a later one.

    Attributes:
        rows: positions of the reader's own entries, contiguous; of a later stage's reader, its places among the mixtures sent.
        num_columns: number of entries that it reads, on all stages.
        weight_columns: what this stage reads of them: columns of the reader's weights, and the positions of the entries, in runs
            that are contiguous in both.
    """

    rows: slice
    num_columns: int
    weight_columns: list[tuple[slice, slice]]


@dataclass(frozen=True)
class LaterReaders:
    """Readers of later stages to whose partial mixtures this stage adds the same entries.

    Attributes:
        rows: their places among the mixtures sent.
        entries: positions of the entries.
        begins: whether their mixtures begin on this stage; otherwise they have been received.
    """

    rows: Places
    entries: Places
    begins: bool


def paired_runs(positions: Sequence[int | None]) -> list[tuple[slice, slice]]:
    """Indices and positions in maximal runs that are contiguous in both, in the given order, without those that have no position."""
    runs: list[tuple[slice, slice]] = []
    for index, position in enumerate(positions):
        if position is None:
            continue
        if runs and (runs[-1][0].stop, runs[-1][1].stop) == (index, position):
            indices, run = runs.pop()
            runs.append((slice(indices.start, index + 1), slice(run.start, position + 1)))
        else:
            runs.append((slice(index, index + 1), slice(position, position + 1)))
    return runs


def contiguous_runs(numbers: Sequence[int]) -> list[slice]:
    """Maximal slices of consecutive numbers, in the given order."""
    runs: list[slice] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = slice(runs[-1].start, number + 1)
        else:
            runs.append(slice(number, number + 1))
    return runs
