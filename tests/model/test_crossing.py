"""Protects what crosses boundaries: the least at every one of them, and enough for every stage to make what it sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policies import POLICIES

from lime_dist.config.schema import LimeConfig
from lime_dist.model.crossing import ENTRIES, Prices, crossings, pairs_by_layer, sources_of_readers
from lime_dist.model.layout import StageLayout
from lime_dist.model.places import Reader
from lime_dist.model.policies import Entry, HistoryPolicy, make_policy

MINIMAL = Prices(1, 1)
LAYERS = 5


def policy_of(history: dict[str, Any]) -> HistoryPolicy:
    return make_policy(LimeConfig.model_validate({"history": history}))


@dataclass(frozen=True)
class ReadSets:
    """Any sets of entries, by layer."""

    sets: tuple[tuple[Entry, ...], ...]

    def reads(self, layer: int) -> Sequence[Entry]:
        return self.sets[layer]


@st.composite
def read_sets(draw: st.DrawFn) -> ReadSets:
    """Random slots, and rows of the summary of a chunk that starts at layer 0 or 1, in the order of a policy."""
    start, end, rows = draw(st.integers(0, 1)), draw(st.integers(1, LAYERS - 2)), draw(st.integers(0, 2))
    summary = [Entry(end, True, row, end + 1 - start) for row in range(rows)]
    sets = []
    for layer in range(LAYERS):
        choices = [Entry(earlier) for earlier in range(layer)]
        chosen = [entry for entry in choices if draw(st.booleans())]
        if layer > end and draw(st.booleans()):
            chosen = sorted([*chosen, *summary])
        sets.append((*chosen, Entry(layer)))
    return ReadSets(tuple(sets))


def least_of_all_plans(policy: HistoryPolicy, boundaries: Sequence[int], prices: Prices) -> int:
    """The least cost of what crosses ``boundaries`` over all plans in which each entry crosses those up to some boundary (``sent``)
    and each partial mixture those from some boundary on (``begun``), and every pair meets on some stage."""
    assert prices.mixture is not None
    sources = {r: [e for e in entries if e != r] for r, entries in sources_of_readers(policy, LAYERS).items()}
    entries = list({entry for read in sources.values() for entry in read})
    crossed = [[b for b in boundaries if b > entry.layer] for entry in entries]
    best = 10**9
    for counts in product(*(range(len(each) + 1) for each in crossed)):
        sent = dict(zip(entries, (each[:n] for each, n in zip(crossed, counts, strict=True)), strict=True))
        cost = prices.entry * sum(counts)
        for reader, read in sources.items():
            to_cross = [b for b in boundaries if b <= reader.layer]
            choices = []
            for begun in range(len(to_cross) + 1):
                mixtures = to_cross[begun:]
                # A stage at which a pair can meet: the entry has crossed all boundaries before it, the mixture all behind it.
                if all(
                    set(to_cross) - set(sent[e]) - set(mixtures) <= {b for b in to_cross if b <= e.layer} for e in read
                ):
                    choices.append(prices.mixture * len(mixtures))
            cost += min(choices)
        best = min(best, cost)
    return best


@settings(max_examples=25, deadline=None)
@given(read_sets(), st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2)]), st.sets(st.integers(1, LAYERS - 1), min_size=1))
def test_the_least_of_all_plans(policy: ReadSets, prices: tuple[int, int], cuts: set[int]) -> None:
    """The least of each boundary by itself adds up to the least of all plans of a whole pipeline."""
    chosen, boundaries = Prices(*prices), sorted(cuts)
    crossing = [crossings(policy, LAYERS, chosen)[boundary] for boundary in boundaries]
    cost = sum(prices[0] * len(each.entries) + prices[1] * len(each.mixtures) for each in crossing)
    assert cost == least_of_all_plans(policy, boundaries, chosen)


def numbers(run: slice) -> range:
    return range(run.start, run.stop)


def added(reader: Reader, columns: Sequence[Entry], entries: dict[int, Entry]) -> Counter[Entry]:
    """What a stage adds to a reader's mixture. ``columns``: what the weights' columns are for; ``entries``: by position."""
    assert reader.num_columns == len(columns)
    count: Counter[Entry] = Counter()
    for weights, run in reader.weight_columns:
        for column, position in zip(numbers(weights), numbers(run), strict=True):
            assert entries[position] == columns[column]
            count[columns[column]] += 1
    return count


def check_stages(policy: HistoryPolicy, layers: int, bounds: Sequence[int], prices: Prices) -> None:
    """Follow every pair through the stages of a pipeline: each stage has what it mixes, and each pair is mixed once."""
    sources, pairs = sources_of_readers(policy, layers), pairs_by_layer(policy, layers, prices)
    sent: set[Entry] = set()
    mixtures: dict[Entry, Counter[Entry]] = {}
    for start, stop in pairwise(bounds):
        layout = StageLayout(policy, (range(start, stop),), layers, 3, prices)
        assert sent == set(layout.incoming.entries) and mixtures.keys() == set(layout.incoming.mixtures)
        entries, places = {position: entry for entry, position in layout.position.items()}, layout.outgoing.mixtures
        mixed: list[Counter[Entry]] = []
        for reader in layout.readers:
            for name in (entries[position] for position in numbers(reader.rows)):
                mixed.append(added(reader, sources[name], entries))
                assert mixed[-1] + mixtures.pop(name, Counter()) == Counter(sources[name])
        passed = {places[p]: q for a, b in layout.passed_mixtures for p, q in zip(numbers(a), numbers(b), strict=True)}
        assert passed == {reader: layout.mixture_position[reader] for reader in mixtures}
        mixtures = {reader: mixtures.get(reader, Counter()) for reader in places}
        of_groups: Counter[tuple[int, Entry]] = Counter()
        for group in layout.later_groups:
            of_groups.update(product(group.rows.positions, map(entries.get, group.entries.positions)))
        for reader in layout.later_readers:
            for place in numbers(reader.rows):
                mixed.append(added(reader, sources[places[place]], entries))
                mixtures[places[place]] += mixed[-1]
                of_groups.subtract((place, entry) for entry in mixed[-1])
        assert all(mixtures.values()) and not any(of_groups.values())
        assert sum(each.total() for each in mixed) == sum(pairs[start:stop])
        sent = set(layout.outgoing.entries)
        assert sent <= set(layout.position)
    assert not sent and not mixtures


@settings(max_examples=25, deadline=None)
@given(read_sets(), st.sampled_from([(1, 1), (1, 2), (3, 2)]), st.sets(st.integers(1, LAYERS - 1)))
def test_every_pair_is_mixed_once(policy: ReadSets, prices: tuple[int, int], cuts: set[int]) -> None:
    check_stages(policy, LAYERS, [0, *sorted(cuts), LAYERS], Prices(*prices))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prices", [ENTRIES, MINIMAL, Prices(1, 2), Prices(2, 1)], ids=str)
def test_every_pair_of_a_policy_is_mixed_once(policy: str, prices: Prices) -> None:
    for bounds in ([0, 13], [0, 1, 2, 5, 9, 13], [*range(14)], [0, 6, 7, 13]):
        check_stages(policy_of(POLICIES[policy]), 13, bounds, prices)


def over_all_boundaries(history: dict[str, Any], layers: int, stages: int, prices: Prices) -> tuple[int, int]:
    """Entries and partial mixtures over the boundaries of equal stages: their sum, and the most over one boundary."""
    each = crossings(policy_of(history), layers, prices)
    counts = [len(each[boundary]) for boundary in range(layers // stages, layers, layers // stages)]
    return sum(counts), max(counts)


FULL, DILATED = {"policy": "full"}, {"policy": "dilated", "stride": 4, "first": 1, "last": 1}
CHUNKED = {"policy": "chunked", "chunk_size": 16, "rank": 2, "first": 2}


@pytest.mark.parametrize(
    ("history", "layers", "stages", "entries", "minimum"),
    [
        (FULL, 64, 8, (224, 56), (128, 32)),
        (FULL, 128, 16, (960, 120), (512, 64)),
        (DILATED, 128, 16, (255, 31), (216, 25)),
        (CHUNKED, 128, 16, (204, 24), (188, 22)),
        ({"policy": "first_last", "first": 2, "last": 1}, 64, 8, (7 * 3, 3), (7 * 3, 3)),
    ],
    ids=lambda value: str(value.get("policy")) if isinstance(value, dict) else "",
)
def test_numbers(
    history: dict[str, Any], layers: int, stages: int, entries: tuple[int, int], minimum: tuple[int, int]
) -> None:
    assert over_all_boundaries(history, layers, stages, ENTRIES) == entries
    assert over_all_boundaries(history, layers, stages, MINIMAL) == minimum


def test_full_history() -> None:
    """min(b, L − b), entries first: at a tie nothing has to be computed before the boundary."""
    for boundary, crossing in enumerate(crossings(policy_of(FULL), 64, MINIMAL)):
        crosses = (boundary, 0) if boundary <= 32 else (0, 64 - boundary)
        assert (len(crossing.entries), len(crossing.mixtures)) == crosses
    pairs = pairs_by_layer(policy_of(FULL), 64, MINIMAL)
    assert sum(pairs) == 64 * 65 // 2 and pairs[32] == 33 * 31 + 33, "layer 32 begins the mixtures of all later layers"
