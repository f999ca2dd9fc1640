"""What follows from a policy and from what crosses boundaries: where a stage keeps its entries, and who reads them together.

An *entry* is a slot or a row of a summary. A *position* is an entry's place in a stage's buffer. A *reader* mixes entries: it is
a layer, or a row of a summary, which mixes the slots of its chunk; its position is that of its own entry. A *block* is up to
``block`` consecutive layers; it does not extend past the end of a chunk that is summarised. What all layers of a block read from
older entries is one product per run of positions, and so are the gradients that all of their slots get from newer readers. What
only some layers read, each of them reads alone, so nothing is multiplied by zero. `history.py` draws an example.

What a stage receives has the first positions, in the order in which it crossed the boundary: entries, then partial mixtures
(`crossing.py`). A partial mixture that only passes through is copied into the next payload, where the stage adds what it has to
add; mixtures that begin on the stage are made there as well. The stage's own entries follow, those with the latest last reader
first. Entries that are read for long thus lie together, and what a block reads forms few runs,
whatever the policy.

A stage with several parts (`crossing.Cut`) has one layout, and one buffer, for all of them: what its parts receive comes first, one
part after the other. An entry keeps its place until the last part has read it, so no part receives it again. In backward the readers
of later parts have been visited by the time at which an entry's own part is: its gradient is complete then, and goes back once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from lime_dist.model.chunks import Chunk, summarised_chunks
from lime_dist.model.crossing import ENTRIES, Crossing, Prices, crossings, sources_of_readers
from lime_dist.model.places import Block, LaterReaders, Places, Reader, contiguous_runs, paired_runs
from lime_dist.model.policies import Entry, HistoryPolicy

BLOCK = 8
"""Most layers of a block: with fewer the products are too thin, with more too much is read layer by layer."""
SUMMARY_BLOCK = 4
"""Most summaries whose gradients from newer readers are one product."""


@dataclass(frozen=True)
class StageLayout:
    """Where a stage keeps its entries.

    Attributes:
        parts: the layers of each of its parts, ascending. A stage with one part holds consecutive layers.
        block: most layers of a block.
    """

    policy: HistoryPolicy
    parts: tuple[range, ...]
    num_layers: int
    block: int = BLOCK
    prices: Prices = ENTRIES

    # -- what the stage receives, makes and sends ---------------------------------------------------------------------

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers of all parts."""
        return tuple(layer for part in self.parts for layer in part)

    @cached_property
    def row(self) -> dict[int, int]:
        """By layer of this stage: its number among them."""
        return {layer: row for row, layer in enumerate(self.layers)}

    @cached_property
    def received(self) -> list[Crossing]:
        """By part: what crosses the boundary before it."""
        return [crossings(self.policy, self.num_layers, self.prices)[part.start] for part in self.parts]

    @cached_property
    def sent(self) -> list[Crossing]:
        """By part: what crosses the boundary behind it."""
        return [crossings(self.policy, self.num_layers, self.prices)[part.stop] for part in self.parts]

    @cached_property
    def incoming(self) -> Crossing:
        """What all parts receive, one after the other."""
        return joined(self.received)

    @cached_property
    def outgoing(self) -> Crossing:
        """What all parts send, one after the other."""
        return joined(self.sent)

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks whose summary this stage computes: those whose last layer it holds."""
        return [c for c in self._all_chunks if c.layers[-1] in self.row]

    def chunks_of(self, part: int) -> list[Chunk]:
        """Those whose last layer a part holds."""
        return [c for c in self.chunks if c.layers[-1] in self.parts[part]]

    @cached_property
    def later_chunks(self) -> list[Chunk]:
        """The chunks to whose partial summaries this stage adds."""
        return [c for c in self._all_chunks if c.rows[0] in self.outgoing.mixtures and self._mixed[c.rows[0]]]

    @cached_property
    def later_layers(self) -> list[int]:
        """The layers of later stages to whose partial mixtures this stage adds, ascending."""
        return [r.layer for r in self.outgoing.mixtures if not r.is_summary and self._mixed[r]]

    @cached_property
    def _all_chunks(self) -> Sequence[Chunk]:
        return summarised_chunks(self.policy, self.num_layers)

    @cached_property
    def _mixed(self) -> dict[Entry, tuple[Entry, ...]]:
        """By reader of this stage, and of later stages whose partial mixtures it sends: the entries that it mixes here, in order.

        They are those that the stage makes and, if the reader's mixture begins here, those that it receives.
        """
        sources, made = sources_of_readers(self.policy, self.num_layers), sorted(self._made)
        available = {*made, *self.incoming.entries}
        begun = set(self.incoming.mixtures)

        def mixed(reader: Entry) -> Iterator[Entry]:
            read = sources[reader]
            if reader in begun:  # sources are sorted, and most of them were mixed before
                return (entry for entry in made if read[min(bisect_left(read, entry), len(read) - 1)] == entry)
            return (entry for entry in read if entry in available)

        return {reader: tuple(mixed(reader)) for reader in (*self._made, *self.outgoing.mixtures)}

    @cached_property
    def _made(self) -> list[Entry]:
        return [*map(Entry, self.layers), *(row for chunk in self.chunks for row in chunk.rows)]

    @cached_property
    def reads(self) -> dict[int, tuple[Entry, ...]]:
        """By layer of the stage: the entries that it mixes here, own slot last."""
        return {layer: self._mixed[Entry(layer)] for layer in self.layers}

    def sources(self, chunk: Chunk) -> Places:
        """Positions of the slots that the stage adds to the chunk's summary."""
        return self.places(self._mixed[chunk.rows[0]])

    # -- positions ----------------------------------------------------------------------------------------------------

    @cached_property
    def own(self) -> tuple[Entry, ...]:
        """The entries that this stage makes, in the order of their positions."""
        last_reader = {entry: entry.layer for entry in self._made}
        for reader, entries in self._mixed.items():
            last_reader.update((e, max(last_reader[e], reader.layer)) for e in entries if e in last_reader)
        return tuple(sorted(self._made, key=lambda entry: (-last_reader[entry], entry)))

    @property
    def first_own(self) -> int:
        """The first position of the stage's own entries."""
        return len(self.incoming)

    @property
    def num_positions(self) -> int:
        return self.first_own + len(self.own)

    @cached_property
    def position(self) -> dict[Entry, int]:
        """By entry of this stage, received or made here."""
        return {
            **{entry: place for place, entry in enumerate(self.incoming.entries)},
            **{entry: self.first_own + place for place, entry in enumerate(self.own)},
        }

    @cached_property
    def mixture_position(self) -> dict[Entry, int]:
        """By reader: the position of its partial mixture, if that has been received."""
        return {reader: len(self.incoming.entries) + place for place, reader in enumerate(self.incoming.mixtures)}

    @cached_property
    def part_of(self) -> dict[Entry, int]:
        """By entry of this stage: the part that receives or makes it."""
        received = {entry: part for part, each in enumerate(self.received) for entry in each.entries}
        made = {entry: self.part_of_layer(entry.layer) for entry in self._made}
        return {**received, **made}

    def part_of_layer(self, layer: int) -> int:
        return next(part for part, layers in enumerate(self.parts) if layer in layers)

    @cached_property
    def kept_for(self) -> dict[Entry, frozenset[Entry]]:
        """By entry of this stage: the readers in later parts than its own, as the entries that they make."""
        if len(self.parts) == 1:
            return {}
        kept = {}
        for entry, own in self.part_of.items():
            later = frozenset(r for r in self.readers_of(entry) if self.part_of_layer(r.layer) > own)
            if later:
                kept[entry] = later
        return kept

    def slot(self, layer: int) -> int:
        """Position of a layer's slot."""
        return self.position[Entry(layer)]

    def places(self, entries: Iterable[Entry]) -> Places:
        return Places(tuple(sorted(self.position[entry] for entry in set(entries))))

    # -- readers ------------------------------------------------------------------------------------------------------

    @cached_property
    def readers(self) -> list[Reader]:
        """The readers of all parts, one part after the other."""
        return [reader for readers in self.readers_by_part for reader in readers]

    @cached_property
    def readers_by_part(self) -> list[list[Reader]]:
        """By part: its layers, ascending, then its chunks, ascending."""
        return [
            [
                self._reader(own, contiguous_runs([self.position[entry] for entry in own]))
                for own in ([*([Entry(layer)] for layer in layers), *(chunk.rows for chunk in self.chunks_of(part))])
            ]
            for part, layers in enumerate(self.parts)
        ]

    @cached_property
    def reader_of(self) -> dict[int, Reader]:
        """By layer of the stage."""
        return {
            layer: reader
            for layers, readers in zip(self.parts, self.readers_by_part, strict=True)
            for layer, reader in zip(layers, readers, strict=False)
        }

    @cached_property
    def later_readers(self) -> list[Reader]:
        """`later_layers`, then `later_chunks`."""
        rows = [[Entry(layer)] for layer in self.later_layers] + [chunk.rows for chunk in self.later_chunks]
        return [self._reader(own, contiguous_runs([self.outgoing.mixtures.index(row) for row in own])) for own in rows]

    def _reader(self, rows: Sequence[Entry], places: Sequence[slice]) -> Reader:
        mixed = set(self._mixed[rows[0]])
        columns = sources_of_readers(self.policy, self.num_layers)[rows[0]]
        (own,) = places
        runs = paired_runs([self.position[entry] if entry in mixed else None for entry in columns])
        return Reader(own, len(columns), runs)

    @cached_property
    def passed_mixtures(self) -> list[tuple[slice, slice]]:
        """The partial mixtures that are received and sent, in runs: their places among the mixtures sent, and their positions."""
        return paired_runs([self.mixture_position.get(reader) for reader in self.outgoing.mixtures])

    @cached_property
    def come_back(self) -> frozenset[Entry]:
        """The entries that get a gradient from later stages: their own, or that of partial mixtures that they are part of."""
        return frozenset(self.outgoing.entries).union(*(self._mixed[reader] for reader in self.outgoing.mixtures))

    @cached_property
    def later_groups(self) -> list[LaterReaders]:
        """The readers of later stages by what the stage adds to their mixtures."""
        groups: dict[tuple[tuple[Entry, ...], bool], list[int]] = {}
        for place, reader in enumerate(self.outgoing.mixtures):
            if self._mixed[reader]:
                key = self._mixed[reader], reader not in self.mixture_position
                groups.setdefault(key, []).append(place)
        return [
            LaterReaders(Places(tuple(rows)), self.places(entries), begins)
            for (entries, begins), rows in groups.items()
        ]

    @cached_property
    def _sources(self) -> dict[Entry, frozenset[Entry]]:
        """By reader of this stage (the entry whose position it has): what it mixes here."""
        return {reader: frozenset(self._mixed[reader]) for reader in self._made}

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
        ranges = [block for part in self.parts for block in block_ranges(part, ends, self.block)]
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
        each = [self.chunks_of(part) for part in range(len(self.parts))]
        for chunks in (own[i : i + SUMMARY_BLOCK] for own in each for i in range(0, len(own), SUMMARY_BLOCK)):
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


def joined(crossings: Iterable[Crossing]) -> Crossing:
    """What crosses several boundaries, one after the other."""
    each = list(crossings)
    return Crossing(
        tuple(entry for crossing in each for entry in crossing.entries),
        tuple(reader for crossing in each for reader in crossing.mixtures),
    )


def block_ranges(layers: range, ends: Container[int], size: int) -> list[range]:
    """The layers of a stage in blocks of at most ``size``, none of which extends past one of ``ends``."""
    ranges: list[range] = []
    first = layers.start
    for layer in layers:
        if layer in ends or layer + 1 - first == size or layer == layers[-1]:
            ranges.append(range(first, layer + 1))
            first = layer + 1
    return ranges
