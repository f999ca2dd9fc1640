"""Worker cases in which something goes wrong."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.equality import rank_batches
from lime_dist.config.load import make_config


def poisoned_step(
    zero_stage: int, optimizer: dict[str, Any] | None = None, schedule: str = "1f1b", loss: bool = False
) -> dict[str, Any]:
    """Run three steps; in the second, one gradient of the last stage of one replica is infinite; or its loss, while all gradients are
    finite and summed in small pieces."""
    from lime_dist.distributed import quiet
    from lime_dist.pipeline import flat_layout
    from lime_dist.train.build import build_engine

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
            "pipeline": {"schedule": schedule},
            "optimizer": optimizer or {},
        },
        "a test",
    )
    whole = flat_layout.PIECE_ELEMENTS
    flat_layout.PIECE_ELEMENTS = 100 if loss else whole
    try:
        with quiet():
            engine, updater = build_engine(config)
    finally:
        flat_layout.PIECE_ELEMENTS = whole

    def state() -> list[torch.Tensor]:
        return [tensor.clone() for group in updater.parameter_groups for tensor in group.states.values()] + [
            updater.flat_weights.clone()
        ]

    states: list[list[torch.Tensor]] = [state()]
    applied: list[bool] = []
    settle, reduce = updater.settle, updater.reduce_gradients

    def recorded(norms: list[float]) -> bool:
        applied.append(settle(norms))
        return applied[-1]

    def is_poisoned() -> bool:
        return len(applied) == 1 and engine.is_last_stage() and engine.grid.get_data_parallel_rank() == 1

    def poisoned_loss(total: Any) -> None:
        reduce(total * math.inf if loss and is_poisoned() else total)

    def poisoned_gradient() -> None:
        if is_poisoned() and not loss:
            updater.gradient("model.norm.weight")[-1] = math.inf
        begin_last_pass()

    updater.settle, updater.reduce_gradients = recorded, poisoned_loss
    begin_last_pass, updater.begin_last_pass = updater.begin_last_pass, poisoned_gradient
    for step in range(3):
        replica, width = engine.grid.get_data_parallel_rank(), engine.dp_world_size
        engine.train_step(rank_batches(config, step, replica, width, config.train.micro_batch_size))
        states.append(state())
    return {
        "applied": applied,
        "unchanged": all(map(torch.equal, states[1], states[2])),
        "moved": not torch.equal(states[0][-1], states[1][-1]) and not torch.equal(states[2][-1], states[3][-1]),
        "skipped": updater.skipped_steps,
        "updates": updater.step_count,
    }


def poisoned_entry(direction: str, value: float) -> dict[str, Any]:
    """Train three steps on two stages with float8 entries. Before the second one's first payload (``wire_out``) or gradient
    (``wire_in``) is encoded, its last element becomes ``value``."""
    from lime_dist.distributed import quiet
    from lime_dist.pipeline.wire import Wire
    from lime_dist.train.build import build_engine

    config = make_config(
        {
            "model": {
                "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
            },
            "data": {"sequence_length": 4},
            "train": {"global_batch_size": 4, "micro_batch_size": 2},
            "parallel": {"pipeline_stages": 2},
            "pipeline": {"wire_dtype": "fp8"},
        },
        "a test",
    )  # fmt: skip
    with quiet():
        engine, updater = build_engine(config)
    weights, applied = [updater.flat_weights.clone()], []
    settle, encode, chosen = updater.settle, Wire.encode, getattr(engine.module.stage_parts[0], direction)
    poisoned: list[int] = []

    def recorded(norms: list[float]) -> bool:
        applied.append(settle(norms))
        return applied[-1]

    def poisoning(wire: Wire, payload: torch.Tensor) -> torch.Tensor:
        if wire is chosen and len(applied) == 1 and not poisoned:
            poisoned.append(1)
            payload.view(-1)[-1] = value
        return encode(wire, payload)

    updater.settle, Wire.encode = recorded, poisoning
    try:
        for step in range(3):
            engine.train_step(rank_batches(config, step, 0, 1, config.train.micro_batch_size))
            weights.append(updater.flat_weights.clone())
    finally:
        Wire.encode = encode
    return {"applied": applied, "unchanged": torch.equal(weights[1], weights[2])}


def whom_gradients_need(tie_word_embeddings: bool, boundary: str) -> str:
    """Return the hosts that a process names when it waits in ReduceGrads, if each stage has a host of its own."""
    from deepspeed.runtime.pipe.schedule import ReduceGrads

    from lime_dist.distributed import quiet
    from lime_dist.pipeline.placement import Placement
    from lime_dist.train.build import build_engine

    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = {**sizes, "num_hidden_layers": 3, "tie_word_embeddings": tie_word_embeddings}
    with quiet():
        values = {"model": model, "parallel": {"pipeline_stages": 3}, "pipeline": {"boundary": boundary}}
        engine, _ = build_engine(make_config(values, "a test"))
    hosts = Placement(["a", "b", "c"], {})
    return hosts.company(engine._partners(ReduceGrads()), engine.global_rank)


def one_tensor_over_four_replicas(zero_stage: int) -> list[float]:
    """Run one step of the optimizer, without an engine, on a model of one tensor."""
    import torch.distributed as dist

    from lime_dist.pipeline.process_groups import ProcessGroups
    from lime_dist.train.build import make_stage_optimizer

    replicas = dist.new_group(range(4))
    alone = [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]
    parameter = torch.nn.Parameter(torch.ones(3))
    settings = {"lr": 0.1, "min_lr": 0.1, "warmup_steps": 0}
    config = make_config({"optimizer": settings, "parallel": {"zero_stage": zero_stage}}, "a test")
    groups = ProcessGroups(replicas=replicas, pipeline=alone, tied={}, tied_copies=frozenset())
    optimizer = make_stage_optimizer(config, {"model.norm.weight": parameter}, groups)
    (parameter * (1 + dist.get_rank())).sum().backward()
    optimizer.reduce_gradients()
    assert optimizer.settle(optimizer.step().tolist())
    return parameter.tolist()
