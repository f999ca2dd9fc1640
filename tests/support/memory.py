"""Functions for worker processes: what a stage holds and sends while it trains, which plans predict."""

from __future__ import annotations

import gc
from typing import Any

from support.transfers import build, losses_of

from benchmarks.training_step import LiveBytes


def measure_stage(values: dict[str, Any]) -> dict[str, Any]:
    """Of this rank: number of parameters, bytes of parameters and optimizer, peak of live tensor bytes in a step (the second, since
    the first makes what is made once), and bytes sent over each boundary in that step."""
    config, engine, optimizer = build(values)
    losses_of(config, engine, range(1))
    kept = [optimizer.flat_weights, optimizer.flat_gradients, optimizer.masters]
    kept += [state for group in optimizer.parameter_groups for state in group.states.values()]
    before = {name: stats.bytes for name, stats in engine.transfer_stats().items()}
    gc.collect()
    with LiveBytes() as count:
        for tensor in kept:
            count.add(tensor)
        static = count.live
        losses_of(config, engine, range(1, 2))
    return {
        "stage": engine.stage_id,
        "parameters": sum(parameter.numel() for parameter in optimizer.parameters.values()),
        "static": static,
        "peak": count.peak,
        "sent": {name: stats.bytes - before[name] for name, stats in engine.transfer_stats().items()},
    }
