"""Where the parameters of a stage lie in its flat buffers: by owner, then by optimizer group, then by the states that they keep.

Every parameter begins at a multiple of `ALIGNMENT` bytes, and so does the part of every owner. What lies between parameters is
padding; it is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from math import prod

from lime_dist.config.precision import aligned
from lime_dist.model.architecture import GROUPS, Group
from lime_dist.pipeline.owners import assign_owners


@dataclass(frozen=True)
class Place:
    """One parameter's place: elements [begin, end) of the flat buffers.

    Attributes:
        owner: the replica that updates it; 0 if every replica updates everything.
        group: its optimizer group.
        states: names of the states that the optimizer keeps of it.
        shape: its shape.
        stop: where the next parameter may begin; elements [end, stop) are padding.
    """

    owner: int
    group: Group
    states: tuple[str, ...]
    shape: tuple[int, ...]
    begin: int
    end: int
    stop: int


def place_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    groups: Mapping[str, Group],
    states: Mapping[str, tuple[str, ...]],
    owners: int,
    tied: Set[str],
    itemsize: int,
) -> dict[str, Place]:
    """The place of every parameter, in the order in which they lie.

    Args:
        owners: number of replicas that share the parameters; 1: every replica updates everything.
        tied: parameters that another stage holds as well.
        itemsize: bytes per element of the weights.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    owner_of = assign_owners(sizes, owners, tied)
    places: dict[str, Place] = {}
    offset = 0
    for name in sorted(shapes, key=lambda name: (owner_of[name], GROUPS.index(groups[name]), states[name])):
        end = offset + sizes[name]
        stop = offset + aligned(sizes[name], itemsize)
        places[name] = Place(owner_of[name], groups[name], states[name], shapes[name], offset, end, stop)
        offset = stop
    return places


def owner_ranges(places: Mapping[str, Place], owners: int) -> list[tuple[int, int]]:
    """Elements [begin, end) of every owner, with the padding; an owner without parameters has an empty range."""
    ranges = []
    offset = 0
    for owner in range(owners):
        end = max((place.stop for place in places.values() if place.owner == owner), default=offset)
        ranges.append((offset, end))
        offset = end
    return ranges
