"""What crosses a stage boundary: entries of the history, and partial mixtures.

A *partial mixture* is what the stages so far add to the mixture of a later reader, Σ_e W[r, e]·S_e. A *reader* is a layer, or a
row of a summary, which mixes the slots of its chunk; it is named by the entry that it makes. A *pair* is a reader and an entry
that it reads. At the boundary before layer b, a pair is open if its entry exists and its reader is not complete. For each open
pair, the entry crosses or the reader's partial mixture does: what crosses is a vertex cover of the bipartite graph of open
pairs, here one of least cost. Maximum flow finds it (König's theorem, with weights).

One plan for all boundaries
---------------------------
The covers of all boundaries fit together: an entry that does not cross a boundary crosses no later one, and a partial mixture
that crosses one goes on to its reader. So a stage can make everything that it sends from what it receives and what it owns,
wherever the cuts are, and each boundary still has the least that it could have by itself.

Proof. Describe a cover by a set X of entries and readers: the entries that cross, and the readers whose mixture does *not* cross.
Every open pair (r, e) then says: if X has r, it has e. Let X also have all entries that do not exist yet, and no reader that is
complete: those are forced, and what they say of pairs that are not open holds. So the same conditions hold at every
boundary, and the cost of X is a sum over its elements. To have e rather than not costs −∞ before e exists, and its price
afterwards. To have r costs minus the price of a mixture until r is complete, and ∞ afterwards. Both only grow with b. Let A and
B be the largest sets of least cost at boundaries b < b'. A ∪ B and A ∩ B satisfy the conditions as well, and
cost_b(A ∪ B) − cost_b(A) ≤ cost_b'(B) − cost_b'(A ∩ B) ≤ 0: the same elements join, at no higher prices. So A ∪ B has least
cost at b, and as A is the largest such set, B ⊆ A. Over the boundaries, X only shrinks. ∎

The largest set has the most entries and the fewest mixtures: ties go to what needs no computation before the boundary.

For the full history, b entries exist and L − b readers are left, and each reads all: min(b, L − b) cross.

Several parts a stage
---------------------
If a stage holds several parts (`Cut`), entries alone cross, and the stage keeps what it has. An entry travels from the part that
makes it from stage to stage, to each at most once, and no further than a later part of some stage reads it. So a part receives
what the other stages have made since the last part of its own: entries of the P − 1 parts before it, for P stages. For the full
history of L layers in V equal parts a stage that is L·(P − 1)·(1 − 1/(2V)) entries over all boundaries, and L·(P − 1)/(P·V) at most
over one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from lime_dist.model.chunks import summarised_chunks
from lime_dist.model.policies import Entry, HistoryPolicy


@dataclass(frozen=True)
class Cut:
    """Where the decoder is cut into parts, and which stage holds which: part i has layers bounds[i] … bounds[i+1]−1 and lies on
    stage i mod ``stages``. So what leaves a part on the last stage enters the next one on the first stage."""

    bounds: tuple[int, ...]
    stages: int

    @property
    def parts(self) -> list[range]:
        """The layers of each part."""
        return [range(start, stop) for start, stop in pairwise(self.bounds)]

    @property
    def parts_per_stage(self) -> int:
        return (len(self.bounds) - 1) // self.stages

    def of_stage(self, stage: int) -> tuple[range, ...]:
        """The layers of each part of a stage."""
        return tuple(self.parts[stage :: self.stages])


@dataclass(frozen=True)
class Prices:
    """What it costs to send an entry, and a partial mixture; None: partial mixtures are not sent.

    Attributes:
        cut: where the decoder is cut, if stages hold several parts and keep their entries: an entry that a stage has costs nothing,
            and partial mixtures are not sent.
    """

    entry: int = 1
    mixture: int | None = None
    cut: Cut | None = None


ENTRIES = Prices()
"""Entries alone cross."""


@dataclass(frozen=True)
class Crossing:
    """What crosses one boundary, beside the hidden state.

    Attributes:
        entries: slots ascending, then rows of summaries ascending.
        mixtures: the readers whose partial mixtures cross, named by the entries that they make, in the same order.
    """

    entries: tuple[Entry, ...] = ()
    mixtures: tuple[Entry, ...] = ()

    def __len__(self) -> int:
        return len(self.entries) + len(self.mixtures)

    def __str__(self) -> str:
        """The whole payload, for messages, such as ``hidden state + 12 slots + 2 summary rows + 20 partial mixtures``."""
        summary_rows = sum(entry.is_summary for entry in self.entries)
        counts = {"slot": len(self.entries) - summary_rows, "summary row": summary_rows}
        counts["partial mixture"] = len(self.mixtures)
        parts = [f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items() if count]
        return " + ".join(["hidden state", *parts])


@lru_cache(maxsize=64)
def sources_of_readers(policy: HistoryPolicy, num_layers: int) -> Mapping[Entry, tuple[Entry, ...]]:
    """What each reader mixes, its own slot included, in the order of its weights' columns; readers by the entries that they make."""
    sources = {Entry(layer): tuple(policy.reads(layer)) for layer in range(num_layers)}
    for chunk in summarised_chunks(policy, num_layers):
        sources |= dict.fromkeys(chunk.rows, tuple(chunk.sources))
    return sources


@lru_cache(maxsize=64)
def crossings(policy: HistoryPolicy, num_layers: int, prices: Prices = ENTRIES) -> tuple[Crossing, ...]:
    """What crosses the boundary before each layer 0 … L; nothing crosses the first and the last. With ``prices.cut`` only the
    boundaries of the cut count."""
    if prices.cut is not None:
        between = dict(zip(prices.cut.bounds, part_crossings(policy, prices.cut), strict=True))
        return tuple(between.get(boundary, Crossing()) for boundary in range(num_layers + 1))
    sources = sources_of_readers(policy, num_layers)
    made = sorted(set(sources).union(*sources.values()))  # by the time from which they exist
    bit = {entry: 1 << index for index, entry in enumerate(made)}
    masks = {reader: sum(bit[entry] for entry in entries) for reader, entries in sources.items()}
    result = [Crossing()]
    for boundary in range(1, num_layers):
        older = sum(bit[entry] for entry in made if entry.layer < boundary)
        open_pairs = {r: mask & older for r, mask in masks.items() if r.layer >= boundary and mask & older}
        entries, mixtures = _least_cover(open_pairs, prices)
        result.append(Crossing(_in_order(e for e in made if bit[e] & entries), _in_order(mixtures)))
    return (*result, Crossing())


def part_crossings(policy: HistoryPolicy, cut: Cut) -> tuple[Crossing, ...]:
    """What crosses the boundary before each part, and the one behind the last, if every stage keeps the entries that it has received
    or made until its last part; nothing crosses the first and the last."""
    part_of = [part for part, layers in enumerate(cut.parts) for _ in layers]
    last: dict[Entry, int] = {}  # the last part that an entry is sent to
    for reader, entries in sources_of_readers(policy, cut.bounds[-1]).items():
        for entry in entries:
            maker = part_of[entry.layer]
            arrival = maker + (part_of[reader.layer] - maker) % cut.stages  # first part after it on the reader's stage
            last[entry] = max(last.get(entry, 0), arrival)
    return tuple(
        Crossing(_in_order(entry for entry in last if part_of[entry.layer] < part <= last[entry]))
        for part in range(len(cut.bounds))
    )


@lru_cache(maxsize=64)
def pairs_by_layer(policy: HistoryPolicy, num_layers: int, prices: Prices = ENTRIES) -> tuple[int, ...]:
    """Pairs of a reader and an entry that the stage with layer 0, 1, … mixes because it holds that layer, whatever the cuts.

    A stage adds to a partial mixture what it makes, and when the mixture begins also what it received. So a pair belongs to the
    layer of its entry or to the last layer before the first boundary that the mixture crosses, whichever is later.
    """
    begin: dict[Entry, int] = {}
    for boundary, crossing in enumerate(crossings(policy, num_layers, prices)):
        for reader in crossing.mixtures:
            begin.setdefault(reader, boundary - 1)
    counts = [0] * num_layers
    for reader, entries in sources_of_readers(policy, num_layers).items():
        for entry in entries:
            counts[max(entry.layer, begin.get(reader, reader.layer))] += 1
    return tuple(counts)


def _in_order(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: (entry.is_summary, entry)))


def _least_cover(open_pairs: Mapping[Entry, int], prices: Prices) -> tuple[int, list[Entry]]:
    """The cover with the most entries among those of least cost: its entries as a set of bits, and its readers.

    Readers of the same entries, and entries with the same readers, cross together or not at all, so that the graph has a node for
    each such class.

    Args:
        open_pairs: by reader, the entries that it reads and that exist, as a set of bits.
    """
    all_entries = 0
    groups: dict[int, list[Entry]] = {}
    for reader, mask in open_pairs.items():
        groups.setdefault(mask, []).append(reader)
        all_entries |= mask
    if prices.mixture is None:
        return all_entries, []
    classes = [all_entries] if all_entries else []
    for mask in groups:
        classes = [part for each in classes for part in (each & mask, each & ~mask) if part]
    kept = largest_closed_set(
        [prices.entry * each.bit_count() for each in classes],
        [prices.mixture * len(group) for group in groups.values()],
        [[index for index, each in enumerate(classes) if each & mask] for mask in groups],
    )
    entries, mixtures = 0, list[Entry]()
    for index, each in enumerate(classes):
        entries |= each if index in kept[0] else 0
    for index, group in enumerate(groups.values()):
        mixtures += [] if index in kept[1] else group
    return entries, mixtures


def largest_closed_set(
    left: Sequence[int], right: Sequence[int], edges: Sequence[Sequence[int]]
) -> tuple[frozenset[int], frozenset[int]]:
    """The largest sets of left and right nodes for which the left ones inside and the right ones outside form a cover of least
    weight.

    Args:
        left, right: weights of the nodes.
        edges: by right node, its neighbours on the left.
    """
    # Flow from the left to the right. Edges have no limit; nodes have their weights. A node that a search from the left nodes with
    # weight to spare reaches is inside on the right and outside on the left; such a search is the last one.
    spare, room = list(left), list(right)
    neighbours: list[list[int]] = [[] for _ in left]
    for index, nodes in enumerate(edges):
        for node in nodes:
            neighbours[node].append(index)
    flow: dict[tuple[int, int], int] = {}
    while True:
        from_right: dict[int, int | None] = {
            node: None for node, weight in enumerate(spare) if weight
        }  # left: before it
        from_left: dict[int, int] = {}  # right: the left node before it
        queue, end = deque(from_right), None
        while queue and end is None:
            node = queue.popleft()
            for index in neighbours[node]:
                if index in from_left:
                    continue
                from_left[index] = node
                if room[index]:
                    end = index
                    break
                for back in edges[index]:
                    if back not in from_right and flow.get((back, index)):
                        from_right[back] = index
                        queue.append(back)
        if end is None:
            return frozenset(range(len(left))) - from_right.keys(), frozenset(range(len(right))) - from_left.keys()
        path, index = [], end
        while True:
            node = from_left[index]
            path.append((node, index, 1))
            before = from_right[node]
            if before is None:
                break
            path.append((node, before, -1))
            index = before
        amount = min(spare[path[-1][0]], room[end], *(flow[node, i] for node, i, sign in path if sign < 0))
        for node, i, sign in path:
            flow[node, i] = flow.get((node, i), 0) + sign * amount
        spare[path[-1][0]] -= amount
        room[end] -= amount
