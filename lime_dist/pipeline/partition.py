"""Decoder layers -> stages: contiguous, every stage at least one layer, the costliest stage as cheap as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from lime_dist.config.schema import Config
from lime_dist.model.cost import head_flops, layer_flops


def stage_bounds(config: Config) -> list[int]:
    """[0, …, L]: stage s holds decoder layers bounds[s] … bounds[s+1]−1; by hand where ``parallel.stage_layers`` says so."""
    model, parallel = config.model, config.parallel
    if parallel.stage_layers is not None:
        return [0, *accumulate(parallel.stage_layers)]
    costs = [flops.both for flops in layer_flops(model, config.data.sequence_length)]
    costs[-1] += head_flops(model).both
    return balance(costs, parallel.pipeline_stages)


def balance(costs: Sequence[float], parts: int) -> list[int]:
    """Bounds of ``parts`` contiguous, non-empty parts whose largest sum is minimal (dynamic programming, O(parts · n²))."""
    total = [0, *accumulate(costs)]
    count = len(costs)
    best = [float(value) for value in total]  # best[i]: the largest part when the first i items are one part
    cuts: list[list[int]] = []
    for part in range(2, parts + 1):
        fresh, cut = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(part, count + 1):
            for begin in range(part - 1, end):
                worst = max(best[begin], total[end] - total[begin])
                if worst < fresh[end]:
                    fresh[end], cut[end] = worst, begin
        best = fresh
        cuts.append(cut)
    bounds = [count]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    bounds.append(0)
    return bounds[::-1]
