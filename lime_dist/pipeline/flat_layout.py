"""Where the parameters of a stage lie in its flat buffers, in which pieces replicas reduce them, and who updates what (ZeRO 1).

Every parameter begins at a multiple of `ALIGNMENT` bytes. What lies between parameters is padding; it is zero. The buffers consist
of pieces. With ZeRO 1 a piece consists of slices of equal length, one for each replica, which updates what lies in it:

    tied weights      each fills pieces of its own, so that every stage that holds a copy cuts it at the same elements
    whole parameters  in one piece, divided among its slices: those whose update needs them whole, and routers and summaries that
                      several stages hold, which belong to replica 0
    all others        in even pieces that are cut without regard to where parameters begin

With ZeRO 0, or one replica, every replica updates everything. Imports no torch: plans count bytes and calls from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from math import prod

from lime_dist.config.precision import ALIGNMENT, aligned
from lime_dist.model.architecture import Group

PIECE_ELEMENTS = 1 << 25
"""Most elements of a piece. 128 MiB of float32 gradients keep a network busy for many times its latency."""

ORDER: tuple[Group, ...] = ("plain", "routers", "matrices")
"""How groups lie. Backward passes finish the gradients of the last matrices first and that of the embedding (plain) last, and pieces
are reduced from the last one to the first."""


@dataclass(frozen=True)
class Place:
    """One parameter's place: elements [begin, end) of the flat buffers.

    Attributes:
        group: its optimizer group.
        states: names of the states that the optimizer keeps of it.
        shape: its shape.
        stop: where the next parameter may begin; elements [end, stop) are padding.
    """

    group: Group
    states: tuple[str, ...]
    shape: tuple[int, ...]
    begin: int
    end: int
    stop: int


@dataclass(frozen=True)
class Run:
    """Consecutive parameters, or parts of some, that one replica updates and of which the same states are kept.

    Attributes:
        elements: of the flat buffers, with padding.
        parts: by exported name, the elements of the flat buffers that belong to a parameter.
    """

    group: Group
    states: tuple[str, ...]
    elements: range
    parts: Mapping[str, range]


@dataclass(frozen=True)
class FlatLayout:
    """The flat buffers of a stage.

    Attributes:
        places: of every parameter, by exported name, in the order in which they lie.
        pieces: elements of the flat buffers, from the first to the last.
        owners: number of replicas among which updates are divided; 1: every replica updates everything.
    """

    places: Mapping[str, Place]
    pieces: Sequence[range]
    owners: int

    @property
    def size(self) -> int:
        """Elements of a flat buffer."""
        return self.pieces[-1].stop

    def slice(self, piece: range, owner: int) -> range:
        """The elements of a piece that a replica updates."""
        length = len(piece) // self.owners
        return range(piece.start + owner * length, piece.start + (owner + 1) * length)

    def owned(self, owner: int) -> list[range]:
        """The elements that a replica updates: its slice of each piece; everything if there is one owner."""
        return [range(self.size)] if self.owners == 1 else [self.slice(piece, owner) for piece in self.pieces]

    def runs(self, owner: int) -> Iterator[tuple[int, Run]]:
        """What a replica updates, in the order in which it lies, each with the number of the range of `owned` that it is in."""
        places = list(self.places.items())
        first = 0
        for number, own in enumerate(self.owned(owner)):
            while places[first][1].stop <= own.start and first < len(places) - 1:
                first += 1
            kinds: dict[tuple[Group, tuple[str, ...]], dict[str, Place]] = {}
            for name, place in places[first:]:
                if place.begin >= own.stop:
                    break
                if overlap(own, range(place.begin, place.end)):
                    kinds.setdefault((place.group, place.states), {})[name] = place
            for (group, states), held in kinds.items():
                begin, stop = min(place.begin for place in held.values()), max(place.stop for place in held.values())
                parts = {name: overlap(own, range(place.begin, place.end)) for name, place in held.items()}
                yield number, Run(group, states, overlap(own, range(begin, stop)), parts)

    def state_elements(self) -> list[int]:
        """Elements of all optimizer states that each replica keeps, with padding; as `runs`, in one go over all replicas."""
        places, elements, first = list(self.places.values()), [0] * self.owners, 0
        if self.owners == 1:
            return [sum((place.stop - place.begin) * len(place.states) for place in places)]
        for piece in self.pieces:
            length = len(piece) // self.owners
            for owner in range(self.owners):
                begin = piece.start + owner * length
                end = begin + length
                while first < len(places) and places[first].stop <= begin:
                    first += 1
                for place in places[first:]:
                    if place.begin >= end:
                        break
                    if place.end > begin:
                        elements[owner] += (min(end, place.stop) - max(begin, place.begin)) * len(place.states)
        return elements

    @cached_property
    def holders(self) -> dict[str, list[int]]:
        """The replicas that update a part of each parameter, in ascending order."""
        holders: dict[str, list[int]] = {name: [] for name in self.places}
        for owner in range(self.owners):
            for name in {name for _, run in self.runs(owner) for name in run.parts}:
                holders[name].append(owner)
        return holders

    @cached_property
    def keepers(self) -> dict[str, int]:
        """The replica that saves each parameter: one of its holders, the one that saves least so far."""
        load, keepers = [0] * self.owners, dict[str, int]()
        for name, place in sorted(self.places.items(), key=lambda item: (-prod(item[1].shape), item[0])):
            keepers[name] = min(self.holders[name], key=lambda owner: (load[owner], owner))
            load[keepers[name]] += prod(place.shape)
        return keepers

    def divided_in(self, piece: range) -> list[str]:
        """The parameters that have elements in a piece and of which several replicas update a part."""
        return [
            name
            for name, place in self.places.items()
            if len(self.holders[name]) > 1 and overlap(piece, range(place.begin, place.end))
        ]


def overlap(one: range, other: range) -> range:
    """What two ranges have in common; empty if nothing."""
    begin = max(one.start, other.start)
    return range(begin, max(begin, min(one.stop, other.stop)))


def lay_out(
    shapes: Mapping[str, tuple[int, ...]],
    groups: Mapping[str, Group],
    states: Mapping[str, tuple[str, ...]],
    itemsize: int,
    owners: int = 1,
    tied: Set[str] = frozenset(),
    shared: Set[str] = frozenset(),
    whole: Set[str] = frozenset(),
    piece_elements: int | None = None,
) -> FlatLayout:
    """The layout of a stage's parameters.

    Args:
        shapes: by exported name.
        groups: the optimizer group of each.
        states: names of the states that the optimizer keeps of each.
        itemsize: bytes per element of the weights.
        owners: number of replicas that share the updates.
        tied: weights that another stage holds as well, as a whole.
        shared: routers and summaries that another stage holds as well.
        whole: parameters whose update needs them whole.
        piece_elements: most elements of a piece; None: `PIECE_ELEMENTS`.
    """
    layout = _Builder(shapes, groups, states, itemsize, owners, piece_elements or PIECE_ELEMENTS)
    if owners == 1:
        layout.add_even(list(shapes))
    else:
        undivided = {name for name in shapes if name in whole or name in shared}
        for name in sorted(tied & (shapes.keys() - undivided)):
            layout.add_even([name])
        layout.add_whole([name for name in shapes if name in undivided], tied | shared)
        layout.add_even([name for name in shapes if name not in tied and name not in undivided])
    return FlatLayout(layout.places, layout.pieces, owners)


class _Builder:
    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        groups: Mapping[str, Group],
        states: Mapping[str, tuple[str, ...]],
        itemsize: int,
        owners: int,
        piece_elements: int,
    ) -> None:
        self.places: dict[str, Place] = {}
        self.pieces: list[range] = []
        self._shapes, self._groups, self._states, self._owners = shapes, groups, states, owners
        self._lengths = {name: aligned(prod(shape), itemsize) for name, shape in shapes.items()}
        self._unit, self._piece_elements = ALIGNMENT // itemsize, piece_elements
        self._offset = 0

    def add_even(self, names: Sequence[str]) -> None:
        """Parameters one after the other, in even pieces."""
        if not names:
            return
        begin = self._offset
        self._place(names)
        length, unit = self._offset - begin, self._unit * self._owners
        count = max(1, -(-length // self._piece_elements))
        step = -(-length // (count * unit)) * unit
        while begin < self._offset:
            self.pieces.append(range(begin, begin + min(step, -(-(self._offset - begin) // unit) * unit)))
            begin = self.pieces[-1].stop
        self._offset = begin

    def add_whole(self, names: Sequence[str], of_first: Set[str]) -> None:
        """Parameters in one piece, each whole in a slice: the largest one first, each in the slice with the least so far.

        Args:
            of_first: parameters of the first slice.
        """
        if not names:
            return
        slices: list[list[str]] = [[] for _ in range(self._owners)]
        load = [0] * self._owners
        for name in sorted(names, key=lambda name: (name not in of_first, -self._lengths[name], name)):
            owner = 0 if name in of_first else load.index(min(load))
            slices[owner].append(name)
            load[owner] += self._lengths[name]
        begin = self._offset
        for owner, held in enumerate(slices):
            self._offset = begin + owner * max(load)
            self._place([name for name in names if name in held])
        self.pieces.append(range(begin, begin + self._owners * max(load)))
        self._offset = self.pieces[-1].stop

    def _place(self, names: Sequence[str]) -> None:
        for name in sorted(names, key=lambda name: (ORDER.index(self._groups[name]), self._states[name])):
            begin, stop = self._offset, self._offset + self._lengths[name]
            end = begin + prod(self._shapes[name])
            self.places[name] = Place(self._groups[name], self._states[name], self._shapes[name], begin, end, stop)
            self._offset = stop
