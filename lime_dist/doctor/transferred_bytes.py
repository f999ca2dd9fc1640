"""Bytes that a training step transfers between hosts, by formula."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lime_dist.config.schema import Config
from lime_dist.model.architecture import Sizes
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.placement import process_grid
from lime_dist.pipeline.shared_weights import parameters_of_stage
from lime_dist.plan.stage_times import boundary_bytes


def bytes_between_hosts(config: Config, hosts: Sequence[str], topology: str) -> float:
    """Bytes between hosts in one step: payloads and their gradients, and the float32 gradients and updated weights that the
    replicas of a stage exchange in a ring.

    Args:
        hosts: host of each rank.
    """
    stages = config.parallel.pipeline_stages
    grid = process_grid(stages, len(hosts) // stages, topology)
    micro_batches = config.train.global_batch_size / config.train.micro_batch_size / (len(hosts) // stages)
    bounds, payloads = stage_bounds(config), boundary_bytes(config)
    total = 0.0
    for ranks in grid.get_axis_comm_lists("pipe"):
        for part, payload in enumerate(payloads):
            a, b = ranks[part % stages], ranks[(part + 1) % stages]
            total += 2 * micro_batches * payload * (hosts[a] != hosts[b])
    for stage, ranks in enumerate(grid.get_axis_comm_lists("data")):
        links = sum(hosts[a] != hosts[b] for a, b in zip(ranks, [*ranks[1:], ranks[0]], strict=True))
        of_stage: Sizes = {}
        for begin, end in list(pairwise(bounds))[stage::stages]:
            of_stage |= parameters_of_stage(config, range(begin, end))
        gradients = 4 * sum(of_stage.values())
        total += links * 2 * (len(ranks) - 1) / len(ranks) * gradients
    return total
