"""Worker cases that measure what plans predict: what a stage holds and sends while it trains."""

from __future__ import annotations

import gc
from typing import Any

from support.transfers import build, losses_of

from benchmarks.training_step import LiveBytes


def measure_stage(values: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's number of parameters, bytes of parameters and optimizer, peak of live tensor bytes in a step, and the
    bytes sent over each boundary in that step. It is the second step, since the first allocates what is allocated once."""
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
