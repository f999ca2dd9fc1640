"""Protects the policies, and the layouts and boundaries that follow from what they read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from support.policies import POLICIES

from lime_dist.config.schema import LimeConfig
from lime_dist.model.chunks import summarised_chunks
from lime_dist.model.crossing import crossings
from lime_dist.model.layout import StageLayout
from lime_dist.model.policies import Entry, make_policy

LAYERS = 13


def live_entries(policy: Any, boundary: int, num_layers: int) -> tuple[Entry, ...]:
    """The entries that exist before layer ``boundary`` and that some layer ≥ ``boundary`` reads, or that the summary of a chunk
    that is not finished yet needs; slots ascending, then summaries ascending. They are what crosses if mixtures do not."""
    wanted = {entry for layer in range(boundary, num_layers) for entry in policy.reads(layer)}
    wanted |= {
        Entry(layer) for entry in wanted if entry.is_summary and entry.layer >= boundary for layer in entry.layers
    }
    live = tuple(sorted((e for e in wanted if e.layer < boundary), key=lambda entry: (entry.is_summary, entry)))
    assert crossings(policy, num_layers)[boundary].entries == live
    return live


def make(history: dict[str, Any], **lime: Any) -> Any:
    return make_policy(LimeConfig.model_validate({"history": history, **lime}))


def names(policy: Any, layer: int) -> str:
    """Return reads(ℓ) with one word per entry: the layer of a slot, the layers and row of a summary."""
    return " ".join(
        f"U{entry.layers.start}-{entry.layer}.{entry.row}" if entry.is_summary else str(entry.layer)
        for entry in policy.reads(layer)
    )


@pytest.mark.parametrize(
    ("history", "layer", "wanted"),
    [
        ({"policy": "full"}, 0, "0"),
        ({"policy": "full"}, 4, "0 1 2 3 4"),
        ({"policy": "first_last", "first": 2, "last": 1}, 1, "0 1"),
        ({"policy": "first_last", "first": 2, "last": 1}, 7, "0 1 6 7"),
        ({"policy": "first_last", "first": 0, "last": 0}, 7, "7"),
        ({"policy": "dilated", "stride": 3, "first": 2, "last": 1}, 7, "0 1 3 6 7"),
        ({"policy": "dilated", "stride": 3, "first": 0, "last": 2}, 8, "0 3 6 7 8"),
        ({"policy": "chunked", "chunk_size": 4, "rank": 1, "first": 2}, 3, "0 1 2 3"),
        ({"policy": "chunked", "chunk_size": 4, "rank": 1, "first": 2}, 4, "0 1 U0-3.0 4"),
        ({"policy": "chunked", "chunk_size": 4, "rank": 2, "first": 1}, 9, "0 U0-3.0 U0-3.1 U4-7.0 U4-7.1 8 9"),
        ({"policy": "chunked", "chunk_size": 4, "rank": 1, "first": 4}, 5, "0 1 2 3 U0-3.0 4 5"),
        ({"policy": "chunked", "chunk_size": 1, "rank": 1, "first": 0}, 2, "U0-0.0 U1-1.0 2"),
    ],
)
def test_reads(history: dict[str, Any], layer: int, wanted: str) -> None:
    assert names(make(history), layer) == wanted


def test_layers_before_the_first_reader_read_their_own_slot() -> None:
    policy = make({"policy": "full"}, routes="hidden", start_layer=3)
    assert [names(policy, layer) for layer in range(5)] == ["0", "1", "2", "0 1 2 3", "0 1 2 3 4"]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_every_policy_guarantees(policy: str) -> None:
    """Reads are ascending and unique, end with the own slot, and include no later layer and no unfinished chunk."""
    for layer in range(LAYERS):
        reads = make(POLICIES[policy]).reads(layer)
        assert list(reads) == sorted(set(reads)) and reads[-1] == Entry(layer)
        assert all(entry.layer < layer for entry in reads[:-1])


@pytest.mark.parametrize(
    ("history", "bound"),
    [
        ({"policy": "full"}, lambda b: b),
        ({"policy": "first_last", "first": 2, "last": 1}, lambda b: min(b, 3)),
        ({"policy": "first_last", "first": 4, "last": 3}, lambda b: min(b, 7)),
        ({"policy": "chunked", "chunk_size": 8, "rank": 2, "first": 3}, lambda b: min(b, 3 + 2 * (b // 8) + b % 8)),
        ({"policy": "chunked", "chunk_size": 4, "rank": 1, "first": 2}, lambda b: min(b, 2 + b // 4 + b % 4)),
        ({"policy": "dilated", "stride": 4, "first": 2, "last": 2}, lambda b: min(b, 4 + -(-b // 4))),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "bound",
)
def test_entries_over_a_boundary_stay_within_the_designs_bounds(history: dict[str, Any], bound: Any) -> None:
    policy = make(history)
    counts = [len(live_entries(policy, boundary, 64)) for boundary in range(65)]
    assert counts[0] == counts[64] == 0
    for boundary in range(1, 64):
        assert counts[boundary] <= bound(boundary)


def test_entries_that_cross_while_a_chunk_is_open() -> None:
    """Before layer 6 of chunks of 4: the first slot, the finished summary, and the slots that the next summary needs."""
    policy = make({"policy": "chunked", "chunk_size": 4, "rank": 1, "first": 1})
    crossing = live_entries(policy, 6, 12)
    assert [(entry.layer, entry.is_summary) for entry in crossing] == [(0, False), (4, False), (5, False), (3, True)]


def test_the_last_chunk_has_no_summary() -> None:
    policy = make({"policy": "chunked", "chunk_size": 4, "rank": 2, "first": 1})
    assert [(chunk.layers, chunk.num_rows) for chunk in summarised_chunks(policy, 12)] == [
        (range(0, 4), 2),
        (range(4, 8), 2),
    ]
    assert summarised_chunks(policy, 4) == ()
    assert live_entries(policy, 11, 12) == tuple(sorted(policy.reads(11)[:-1], key=lambda e: (e.is_summary, e)))


@pytest.mark.parametrize("block", [1, 2, 8])
@pytest.mark.parametrize("policy", POLICIES)
def test_layout(policy: str, block: int) -> None:
    """For every stage of every cut: what it reads has a place, what it receives lies first, and blocks cover its layers."""
    rule = make(POLICIES[policy])
    for start in range(LAYERS):
        for stop in range(start + 1, LAYERS + 1):
            layout = StageLayout(rule, (range(start, stop),), LAYERS, block)
            assert layout.incoming.entries == live_entries(
                rule, start, LAYERS
            ) and layout.outgoing.entries == live_entries(rule, stop, LAYERS)
            assert [layout.position[entry] for entry in layout.incoming.entries] == list(
                range(len(layout.incoming.entries))
            )
            assert sorted(layout.position.values()) == list(range(layout.num_positions))
            assert set(layout.outgoing.entries) <= set(layout.position)
            for layer in range(start, stop):
                of_layer = layout.blocks[layer]
                assert layer in of_layer.layers and len(of_layer.layers) <= block
                reads = {layout.position[entry] for entry in rule.reads(layer)}
                alone = set(layout.read_alone[layer].positions)
                assert alone | set(of_layer.older.positions) == reads and not alone & set(of_layer.older.positions)
                readers = {layout.slot(r) for r in range(start, stop) if Entry(layer) in rule.reads(r)}
                readers |= {layout.position[row] for c in layout.chunks if layer in c.layers for row in c.rows}
                alone = set(layout.readers_alone[layer].positions)
                assert alone | set(of_layer.readers.positions) == readers and not alone & set(
                    of_layer.readers.positions
                )


@pytest.mark.parametrize("policy", list(POLICIES)[1:])
def test_stages_make_every_entry_once(policy: str) -> None:
    rule = make(POLICIES[policy])
    cuts = [0, 2, 5, 9, LAYERS]
    made = [entry for a, b in pairwise(cuts) for entry in StageLayout(rule, (range(a, b),), LAYERS).own]
    assert len(made) == len(set(made))
    assert {entry for layer in range(LAYERS) for entry in rule.reads(layer)} <= set(made)
