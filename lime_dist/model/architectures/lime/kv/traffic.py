"""Memory traffic of the history of ``routes: kv``: the operations of `KeyValueHistory` in a stage's forward pass, counted in entries.

A copy reads and writes. A product reads what it mixes and writes the mixture; if it adds to a mixture, it reads that as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from lime_dist.model.layout import StageLayout


def entries_moved(layout: StageLayout) -> int:
    """Entries and mixtures read or written by a stage: slots, mixtures of its layers, summaries, and what it sends."""
    blocks = list(dict.fromkeys(layout.blocks.values()))
    moved = 2 * len(layout.layers)  # keys and values become slots
    for block in blocks:
        if block.older.runs:
            received = _received(layout, block.own.positions)
            moved += received + _products(len(block.own), block.older.runs, received > 0) + 2 * len(block.own)
    for layer, alone in layout.read_alone.items():
        continues = bool(layout.blocks[layer].older.runs)
        received = 0 if continues else _received(layout, [layout.slot(layer)])
        moved += received + _products(1, alone.runs, continues or received > 0)
    for chunk in layout.chunks:
        rows = layout.places(chunk.rows)
        received = _received(layout, rows.positions)
        moved += received + (2 * len(rows) if received else 0)
        moved += _products(len(rows), layout.sources(chunk).runs, received > 0)
    return moved + _sent(layout)


def _sent(layout: StageLayout) -> int:
    """What is written into the payload of the next stage."""
    passed = sum(places.stop - places.start for places, _ in layout.passed_mixtures)
    return 2 * (len(layout.outgoing.entries) + passed) + sum(
        _products(run.stop - run.start, group.entries.runs, not group.begins)
        for group in layout.later_groups
        for run in group.rows.runs
    )


def _received(layout: StageLayout, positions: Sequence[int]) -> int:
    """A copy of the partial mixtures received for some readers, in which those of the others are zero."""
    own = layout.own
    received = sum(own[position - layout.first_own] in layout.mixture_position for position in positions)
    return 2 * received + (len(positions) if 0 < received < len(positions) else 0)


def _products(readers: int, runs: Sequence[slice], continues: bool) -> int:
    """One product for each run of entries: into the readers' mixtures, or added to them."""
    mixtures = readers * (2 * len(runs) - (not continues))
    return sum(run.stop - run.start for run in runs) + mixtures
