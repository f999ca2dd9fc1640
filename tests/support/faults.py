"""Worker cases in which something goes wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
from support.cases import rank_batches

from lime_dist.config.load import make_config


def poisoned_step(zero_stage: int) -> dict[str, Any]:
    """Three steps, the second with an infinity in one gradient of the last stage of one replica only."""
    from lime_dist.distributed import quiet
    from lime_dist.train.optim import build_engine

    config = make_config(
        {
            "model": {
                "vocab_size": 11,
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
            },
            "data": {"sequence_length": 4},
            "train": {"global_batch_size": 4, "micro_batch_size": 2},
            "parallel": {"pipeline_stages": 2, "zero_stage": zero_stage},
        },
        "a test",
    )
    with quiet():
        engine, optimizer = build_engine(config)
    weights, applied = [optimizer.flat_weights.clone()], []
    update, reduce = optimizer.step, optimizer.reduce_gradients

    def recorded() -> bool:
        applied.append(update())
        return applied[-1]

    def poisoned() -> None:
        if len(applied) == 1 and engine.is_last_stage() and engine.grid.get_data_parallel_rank() == 1:
            optimizer.flat_gradients[-1] = math.inf
        reduce()

    optimizer.step, optimizer.reduce_gradients = recorded, poisoned
    for step in range(3):
        engine.train_step(rank_batches(config, step, engine.grid.get_data_parallel_rank(), engine.dp_world_size))
        weights.append(optimizer.flat_weights.clone())
    return {
        "applied": applied,
        "unchanged": torch.equal(weights[1], weights[2]),
        "moved": not torch.equal(weights[0], weights[1]) and not torch.equal(weights[2], weights[3]),
        "skipped": optimizer.skipped_steps,
        "updates": optimizer.step_count,
    }
