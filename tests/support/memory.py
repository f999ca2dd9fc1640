"""Worker cases about memory: what a stage really holds while it trains."""

from __future__ import annotations

import gc
from typing import Any

from benchmarks.training_step import LiveBytes
from support.transfers import build, losses_of


def peak_bytes(values: dict[str, Any]) -> dict[str, Any]:
    """Of this rank in one step, after one that makes what is made once: parameters with optimizer, and the peak of live
    tensor bytes with them."""
    config, engine, optimizer = build(values)
    losses_of(config, engine, range(1))
    kept = [optimizer.flat_weights, optimizer.flat_gradients, optimizer.masters]
    if optimizer.adam is not None:
        for state in optimizer.adam.state.values():
            kept += [state["exp_avg"], state["exp_avg_sq"]]
    gc.collect()
    with LiveBytes() as count:
        for tensor in kept:
            count.add(tensor)
        static = count.live
        losses_of(config, engine, range(1, 2))
    return {"stage": engine.stage_id, "replica": engine.grid.get_data_parallel_rank(), "static": static, "peak": count.peak}
