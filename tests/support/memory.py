"""Worker cases that measure what plans predict: what a stage holds and sends while it trains."""

from __future__ import annotations

import gc
from typing import Any

from support.transfers import build, losses_of

from benchmarks.training_step import LiveBytes


def measure_stage(values: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's number of parameters, bytes of parameters and optimizer, peak of live tensor bytes in a step, and the
    bytes sent over each boundary in that step. It is the second step, since the first allocates what is allocated once. Weight passes
    come in the order of the schedule: those that are made sooner hold less."""
    config, engine, optimizer = build(values)
    engine._go_on_with_weights = lambda: False
    losses_of(config, engine, range(1))
    kept = [optimizer.flat_weights, optimizer.flat_gradients, *optimizer.masters]
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


def padding_of_stage(values: dict[str, Any], steps: int) -> dict[str, int]:
    """Train, and return the number of elements between this rank's parameters, how many of them are not zero, in any of its flat
    buffers, and the number of parameters, masters and states that begin at no multiple of 128 bytes."""
    config, engine, optimizer = build(values)
    losses_of(config, engine, range(steps))
    views = {
        buffer: [optimizer._view(buffer, name) for name in optimizer.parameters]
        for buffer in (optimizer.flat_weights.clone(), optimizer.flat_gradients.clone())
    }
    for group in optimizer.parameter_groups:
        for flat in (group.weight.clone(), *(state.clone() for state in group.states.values())):
            views[flat] = [group.view(flat, name) for name in group.spans]
    misplaced = [view for parts in views.values() for view in parts if view.storage_offset() * view.itemsize % 128]
    misplaced += [group.weight for group in optimizer.parameter_groups if group.weight.storage_offset() * 4 % 128]
    for parts in views.values():
        for view in parts:
            view.zero_()
    return {
        "padding": optimizer.flat_weights.numel() - sum(p.numel() for p in optimizer.parameters.values()),
        "not zero": sum(int(buffer.count_nonzero()) for buffer in views),
        "misplaced": len(misplaced),
    }
