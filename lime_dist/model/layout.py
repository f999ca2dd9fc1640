"""What follows from a policy: which entries cross a boundary, where a stage keeps its entries, and who reads them together.

An *entry* is a slot or a row of a summary. A *position* is an entry's place in a stage's buffer. A *reader* mixes entries: it is
a layer, or a row of a summary, which mixes the slots of its chunk; its position is that of its own entry. A *block* is up to
``block`` consecutive layers; it does not extend past the end of a chunk that is summarised. What all layers of a block read from
older entries is one product per run of positions, and so are the gradients that all of their slots get from newer readers. What
only some layers read, each of them reads alone, so nothing is multiplied by zero. `history.py` draws an example.

Received entries have the first positions, in the order in which they crossed the boundary. The stage's own entries follow, those
with the latest last reader first. Entries that are read for long thus lie together, and what a block reads forms few runs,
whatever the policy.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lime_dist.model.policies import Entry, HistoryPolicy

BLOCK = 8
"""Most layers of a block: with fewer the products are too thin, with more too much is read layer by layer."""
SUMMARY_BLOCK = 4
"""Most summaries whose gradients from newer readers are one product."""


def live_entries(policy: HistoryPolicy, boundary: int, num_layers: int) -> tuple[Entry, ...]:
    """live(b): the entries that exist before layer ``boundary`` and that some layer ≥ ``boundary`` reads, or that the summary
    of a chunk that is not finished yet needs; slots ascending, then summaries ascending."""
    wanted = {entry for layer in range(boundary, num_layers) for entry in policy.reads(layer)}
    wanted |= {
        Entry(layer) for entry in wanted if entry.is_summary and entry.layer >= boundary for layer in entry.layers
    }
    return tuple(sorted((e for e in wanted if e.layer < boundary), key=lambda entry: (entry.is_summary, entry)))


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


def summarised_chunks(policy: HistoryPolicy, num_layers: int) -> list[Chunk]:
    """The chunks whose summary some layer reads, ascending."""
    read = {entry for layer in range(num_layers) for entry in policy.reads(layer) if entry.is_summary}
    num_rows = {entry.layers: max(e.row for e in read if e.layers == entry.layers) + 1 for entry in read}
    return [
        Chunk(i, layers, num_rows[layers]) for i, layers in enumerate(sorted(num_rows, key=lambda layers: layers.start))
    ]


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
    """What mixes entries: a layer (one row) or a chunk's summary (``num_rows`` rows).

    Attributes:
        rows: positions of the reader's own entries, contiguous.
        columns: positions of the entries it reads, in the order of its weights' columns, as contiguous runs.
    """

    rows: slice
    columns: list[slice]

    @property
    def weight_columns(self) -> list[tuple[slice, slice]]:
        """For each run of ``columns``: the columns of the reader's weights, and the run's positions."""
        pairs, begin = [], 0
        for run in self.columns:
            end = begin + run.stop - run.start
            pairs.append((slice(begin, end), run))
            begin = end
        return pairs


@dataclass(frozen=True)
class StageLayout:
    """Where a stage that holds layers ``start`` … ``stop``−1 keeps its entries; ``block``: most layers of a block."""

    policy: HistoryPolicy
    start: int
    stop: int
    num_layers: int
    block: int = BLOCK

    @cached_property
    def reads(self) -> dict[int, tuple[Entry, ...]]:
        """By layer of the stage: the entries that it reads, own slot last."""
        return {layer: tuple(self.policy.reads(layer)) for layer in range(self.start, self.stop)}

    @cached_property
    def received(self) -> tuple[Entry, ...]:
        return live_entries(self.policy, self.start, self.num_layers)

    @cached_property
    def sent(self) -> tuple[Entry, ...]:
        return live_entries(self.policy, self.stop, self.num_layers)

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks whose summary this stage computes: those whose last layer it holds."""
        chunks = summarised_chunks(self.policy, self.num_layers)
        return [chunk for chunk in chunks if self.start <= chunk.layers[-1] < self.stop]

    @cached_property
    def own(self) -> tuple[Entry, ...]:
        """The entries that this stage makes, in the order of their positions."""
        made = [Entry(layer) for layer in range(self.start, self.stop)]
        made += [row for chunk in self.chunks for row in chunk.rows]
        last_reader = {entry: entry.layer for entry in made}
        for layer, entries in self.reads.items():
            last_reader.update(dict.fromkeys(entries, layer))
        for chunk in self.chunks:
            for entry in chunk.sources:
                last_reader[entry] = max(last_reader.get(entry, 0), chunk.layers[-1])
        return tuple(sorted(made, key=lambda entry: (-last_reader[entry], entry)))

    @property
    def num_positions(self) -> int:
        return len(self.received) + len(self.own)

    @cached_property
    def position(self) -> dict[Entry, int]:
        """By entry of this stage, received or made here."""
        return {entry: place for place, entry in enumerate((*self.received, *self.own))}

    def slot(self, layer: int) -> int:
        """Position of a layer's slot."""
        return self.position[Entry(layer)]

    def places(self, entries: Iterable[Entry]) -> Places:
        return Places(tuple(sorted(self.position[entry] for entry in set(entries))))

    # -- readers ------------------------------------------------------------------------------------------------------

    @cached_property
    def readers(self) -> list[Reader]:
        """The layers of the stage, ascending, then its chunks, ascending."""
        layers = [self._reader([Entry(layer)], entries) for layer, entries in self.reads.items()]
        return layers + [self._reader(chunk.rows, chunk.sources) for chunk in self.chunks]

    def _reader(self, rows: Sequence[Entry], columns: Sequence[Entry]) -> Reader:
        (own,) = contiguous_runs([self.position[entry] for entry in rows])
        return Reader(own, contiguous_runs([self.position[entry] for entry in columns]))

    @cached_property
    def _sources(self) -> dict[Entry, frozenset[Entry]]:
        """By reader (the entry whose position it has): what it reads."""
        layers = {Entry(layer): frozenset(entries) for layer, entries in self.reads.items()}
        return layers | {row: frozenset(chunk.sources) for chunk in self.chunks for row in chunk.rows}

    def readers_of(self, entry: Entry) -> frozenset[Entry]:
        """The readers on this stage of an entry, as the entries that they make."""
        return frozenset(reader for reader, sources in self._sources.items() if entry in sources)

    def shared_readers(self, entries: Sequence[Entry]) -> Places:
        """The readers on this stage that read all ``entries``, without those whose own entry is among them."""
        shared = frozenset.intersection(*map(self.readers_of, entries)) if entries else frozenset()
        return self.places(shared - frozenset(entries))

    def other_readers(self, entry: Entry, shared: Places) -> Places:
        """The readers of an entry that are not ``shared``."""
        return self.places(r for r in self.readers_of(entry) if self.position[r] not in shared.positions)

    # -- blocks -------------------------------------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """By layer of the stage: its block."""
        ends = {chunk.layers[-1] for chunk in self.chunks}
        ranges = block_ranges(range(self.start, self.stop), ends, self.block)
        return {layer: block for block in map(self._block, ranges) for layer in block.layers}

    def _block(self, layers: range) -> Block:
        own = [Entry(layer) for layer in layers]
        if len(layers) == 1:
            return Block(layers, self.places(own), Places(()), Places(()))
        shared = frozenset.intersection(*(frozenset(self.reads[layer]) for layer in layers))
        older = self.places(entry for entry in shared if entry.layer < layers[0])
        return Block(layers, self.places(own), older, self.shared_readers(own))

    @cached_property
    def summary_blocks(self) -> dict[int, Block]:
        """By index of a chunk: the block of up to `SUMMARY_BLOCK` summaries whose newer readers are read once for all of them."""
        blocks: dict[int, Block] = {}
        for begin in range(0, len(self.chunks), SUMMARY_BLOCK):
            chunks = self.chunks[begin : begin + SUMMARY_BLOCK]
            rows = [row for chunk in chunks for row in chunk.rows]
            layers = range(chunks[0].layers.start, chunks[-1].layers.stop)
            shared = self.shared_readers(rows) if len(chunks) > 1 else Places(())
            blocks.update(
                dict.fromkeys((c.index for c in chunks), Block(layers, self.places(rows), Places(()), shared))
            )
        return blocks

    @cached_property
    def read_alone(self) -> dict[int, Places]:
        """By layer: what it reads alone, which is what its block does not read for it."""
        return {
            layer: self.places(e for e in entries if self.position[e] not in self.blocks[layer].older.positions)
            for layer, entries in self.reads.items()
        }

    @cached_property
    def readers_alone(self) -> dict[int, Places]:
        """By layer: the readers of its slot that do not read its block as a whole, itself included."""
        return {layer: self.other_readers(Entry(layer), block.readers) for layer, block in self.blocks.items()}


def block_ranges(layers: range, ends: Container[int], size: int) -> list[range]:
    """The layers of a stage in blocks of at most ``size``, none of which extends past one of ``ends``."""
    ranges: list[range] = []
    first = layers.start
    for layer in layers:
        if layer in ends or layer + 1 - first == size or layer == layers[-1]:
            ranges.append(range(first, layer + 1))
            first = layer + 1
    return ranges


def contiguous_runs(numbers: Sequence[int]) -> list[slice]:
    """Maximal slices of consecutive numbers, in the given order."""
    runs: list[slice] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = slice(runs[-1].start, number + 1)
        else:
            runs.append(slice(number, number + 1))
    return runs
