"""Protects stage cuts: optimal against brute force, legal by hand."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

from lime_dist import load_config
from lime_dist.pipeline.partition import balance, stage_bounds


def test_balance_equals_brute_force() -> None:
    generator = random.Random(0)
    for _ in range(200):
        costs = [generator.randint(1, 20) for _ in range(generator.randint(1, 9))]
        parts = generator.randint(1, len(costs))
        found = balance(costs, parts)

        def worst(bounds: list[int], costs: list[int] = costs) -> int:
            return max(sum(costs[a:b]) for a, b in pairwise(bounds))

        every = [[0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), parts - 1)]
        assert found in every and worst(found) == min(map(worst, every))


def test_the_stage_with_the_head_gets_fewer_layers() -> None:
    config = load_config(None, ["model.vocab_size=50000", "model.num_hidden_layers=16", "parallel.pipeline_stages=2"])
    first, second = (b - a for a, b in pairwise(stage_bounds(config)))
    assert first > second >= 1


def test_cuts_by_hand() -> None:
    config = load_config(None, ["parallel.pipeline_stages=3", "parallel.stage_layers=[1,12,3]"])
    assert stage_bounds(config) == [0, 1, 13, 16]
