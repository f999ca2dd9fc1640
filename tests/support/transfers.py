"""Worker cases for transfers: what crosses stage boundaries, and when."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.equality import rank_batches
from lime_dist.config.load import make_config
from lime_dist.model.architectures.lime.kv.history import KeyValueHistory
from lime_dist.pipeline import transfer
from lime_dist.pipeline.wire_format import WireFormat


def build(values: dict[str, Any]) -> tuple[Any, Any, Any]:
    from lime_dist.distributed import quiet
    from lime_dist.train.build import build_engine

    config = make_config(values, "a test")
    with quiet():
        engine, optimizer = build_engine(config)
    return config, engine, optimizer


def losses_of(config: Any, engine: Any, steps: range) -> list[float]:
    replica, width = engine.grid.get_data_parallel_rank(), engine.dp_world_size
    size = config.train.micro_batch_size
    return [engine.train_step(rank_batches(config, step, replica, width, size)) for step in steps]


def count_transferred_bytes(values: dict[str, Any], steps: int) -> dict[str, tuple[int, int]]:
    """Return counted and predicted bytes, for each direction that this stage has."""
    config, engine, _ = build(values)
    losses_of(config, engine, range(steps))
    stage = engine.stage_id
    tokens = config.train.global_batch_size // engine.dp_world_size * config.data.sequence_length * steps

    def predicted(boundary: int) -> int:
        return WireFormat.of(config, engine.module.bounds[boundary]).nbytes(tokens)

    boundary = {"sent to next": stage + 1, "received from next": stage + 1}
    return {
        name: (stats.bytes, predicted(boundary.get(name, stage))) for name, stats in engine.transfer_stats().items()
    }


def count_bytes_of_parts(values: dict[str, Any]) -> dict[str, dict[int, int]]:
    """Return the bytes of one step, by direction and part of this stage."""
    config, engine, _ = build(values)
    losses_of(config, engine, range(1))
    return {
        name: {part: stats.bytes for part, stats in of_parts.items() if stats.bytes}
        for name, of_parts in engine.transfer_stats_of_parts().items()
    }


def positions_of_histories(values: dict[str, Any]) -> int:
    """Return the number of entries in the buffers of this stage's histories in a step, if it is one for all of them, and one history
    for each micro-batch."""
    config, engine, _ = build(values)
    make, made = engine.module.new_history, []

    def counting(*arguments: Any) -> Any:
        made.append(make(*arguments))
        return made[-1]

    engine.module.new_history = counting
    losses_of(config, engine, range(1))
    assert len(made) == config.train.global_batch_size // config.train.micro_batch_size
    (positions,) = {len(history.entries) for history in made}
    return positions


def most_under_way(values: dict[str, Any]) -> tuple[int, int]:
    """Return the largest numbers of payloads and of gradients in transfer at once in a step. None may be left after it."""
    config, engine, _ = build(values)
    most = {id(engine._to_next): 0, id(engine._to_previous): 0}
    post = transfer.Sender.post

    def counting(sender: Any, tensor: Any, part: int = 0) -> None:
        post(sender, tensor, part)
        most[id(sender)] = max(most[id(sender)], len(sender._under_way))

    transfer.Sender.post = counting
    try:
        losses_of(config, engine, range(1))
    finally:
        transfer.Sender.post = post
    assert not any(sender._under_way for sender in (engine._to_next, engine._to_previous) if sender)
    return most[id(engine._to_next)], most[id(engine._to_previous)]


def step_after_a_failed_step(values: dict[str, Any]) -> str:
    """Return the error of a second step after the data of the first ended too early, on all ranks."""
    config, engine, _ = build(values)
    for _ in range(2):
        try:
            engine.train_step(iter(()))
        except (StopIteration, RuntimeError) as error:
            said = str(error)
    return said


def copies_of_payloads(values: dict[str, Any]) -> int:
    """Return how often received entries were copied into a history in one step."""
    config, engine, _ = build(values)
    copies = 0
    unpack = KeyValueHistory.unpack

    def counting(history: KeyValueHistory, payload: Any, hidden_size: int) -> Any:
        nonlocal copies
        copies += payload.data_ptr() != history.memory.data_ptr()
        return unpack(history, payload, hidden_size)

    KeyValueHistory.unpack = counting
    try:
        losses_of(config, engine, range(1))
    finally:
        KeyValueHistory.unpack = unpack
    return copies


def train_with_delays(values: dict[str, Any], steps: int, longest: float) -> list[float]:
    """Return the losses of steps in which each end of each transfer is up to ``longest`` seconds late, at random."""
    import torch.distributed as dist

    config, engine, _ = build(values)
    generator = random.Random(dist.get_rank())
    post, take = transfer.Sender.post, transfer.Receiver.take

    def late_post(sender: Any, tensor: Any, part: int = 0) -> None:
        time.sleep(longest * generator.random())
        post(sender, tensor, part)

    def late_take(receiver: Any, part: int = 0) -> Any:
        time.sleep(longest * generator.random())
        return take(receiver, part)

    if longest:
        transfer.Sender.post, transfer.Receiver.take = late_post, late_take
    try:
        return losses_of(config, engine, range(steps))
    finally:
        transfer.Sender.post, transfer.Receiver.take = post, take


def train_with_interruptions(values: dict[str, Any], folder: str) -> list[float]:
    """Return the losses of four steps. With a folder, evaluations with two batch sizes and a checkpoint come between them."""
    from lime_dist.checkpoint.saver import Saver
    from lime_dist.data.identity import DataIdentity
    from lime_dist.data.state import TrainState

    config, engine, optimizer = build(values)
    replica, width = engine.grid.get_data_parallel_rank(), engine.dp_world_size
    losses = losses_of(config, engine, range(2))
    if folder:
        for size in (1, 4):
            parts = config.train.global_batch_size // size // width
            engine.evaluate(rank_batches(config, 100, replica, width, size), parts, size)
        state = TrainState(2, 2 * config.train.global_batch_size)
        Saver(Path(folder), config, DataIdentity(100), optimizer, engine.stage_id, replica).save(state)
        engine.evaluate(rank_batches(config, 100, replica, width, 2), config.train.global_batch_size // 2 // width, 2)
    return losses + losses_of(config, engine, range(2, 4))


def steps_through_host_memory(values: dict[str, Any]) -> tuple[list[float], list[float], int, int]:
    """Return the losses of two steps without and with host staging of all tensors, and how many tensors were then copied for a
    send and after a receive."""
    import torch.distributed as dist

    from lime_dist import host_staging

    config, engine, _ = build(values)
    direct = losses_of(config, engine, range(2))
    names = ("send", "recv", "isend", "irecv")
    before, is_off_host = {name: getattr(dist, name) for name in names}, host_staging.is_off_host
    counts = dict.fromkeys(names, 0)

    def counting(name: str) -> Any:
        def call(tensor: Any, *arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return before[name](tensor, *arguments, **options)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    host_staging.is_off_host = lambda tensor: True
    host_staging.stage_on_host()
    try:
        config, engine, _ = build(values)
        staged = losses_of(config, engine, range(2))
    finally:
        host_staging.is_off_host = is_off_host
        for name in names:
            setattr(dist, name, before[name])
    return direct, staged, counts["send"] + counts["isend"], counts["recv"] + counts["irecv"]


def group_timeouts(values: dict[str, Any]) -> tuple[list[float], str]:
    """Return the time-outs in seconds of all process groups of this rank with an engine, and that of NCCL's monitor."""
    from torch.distributed import distributed_c10d

    from lime_dist.train.control import Control

    config, engine, _ = build(values)
    control = Control(0, 2, 0, 1, config.pipeline.timeout)
    groups = list(distributed_c10d._world.pg_map)
    del engine, control
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    return timeouts, os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]
