"""Engines of one process for the sections of `gpu_check.py` that measure: steps on random tokens, their seconds and their memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from equality import Batch, loss_and_documents, rank_batches
from gpu_check_machine import on_gpu, synchronise
from training_step import LiveBytes

from lime_dist.config.schema import Config
from lime_dist.distributed import quiet
from lime_dist.plan.forecast import Machine, forecast

if TYPE_CHECKING:  # DeepSpeed chooses its accelerator when it is imported
    from lime_dist.pipeline.engine import LimeEngine
    from lime_dist.train.stage_optimizer import StageOptimizer


@dataclass(frozen=True)
class Trainer:
    """An engine of one stage, and what it needs for a step.

    Attributes:
        batches: the micro-batches of a step, in pinned memory on a GPU, as from the loader.
    """

    config: Config
    engine: LimeEngine
    optimizer: StageOptimizer
    batches: list[Batch]

    def step(self, micro_batches: int | None = None) -> None:
        """Run one step and wait for it; ``micro_batches`` as in `LimeEngine.train_step`."""
        self.engine.train_step(iter(self.batches), micro_batches)
        synchronise()

    def seconds(self, steps: int) -> list[float]:
        """Seconds of each of some steps."""
        taken = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.step()
            taken.append(time.perf_counter() - begin)
        return taken

    def peak_bytes(self) -> int:
        """Peak of live tensor bytes in a step. An earlier step must have allocated what is allocated once.

        On a GPU it is the peak of the bytes that tensors requested, without what libraries hold.
        """
        optimizer = self.optimizer
        kept = [optimizer.flat_weights, optimizer.flat_gradients]
        if optimizer.masters[0].dtype != optimizer.flat_weights.dtype:  # else they are the weights
            kept += optimizer.masters
        kept += [state for group in optimizer.parameter_groups for state in group.states.values()]
        gc.collect()
        if not on_gpu():
            with LiveBytes() as count:
                for tensor in kept:
                    count.add(tensor)
                self.step()
            return count.peak
        torch.cuda.reset_peak_memory_stats()
        others = _requested("current") - sum(tensor.nbytes for tensor in kept)
        self.step()
        return _requested("peak") - others

    @property
    def planned_bytes(self) -> int:
        """What the plan gives for that peak."""
        return planned_bytes(self.config)


def planned_bytes(config: Config) -> int:
    """The plan's peak of a run of one process."""
    return forecast(config, Machine(flops=1.0, memory_bandwidth=1.0, bandwidth=1.0, latency=0.0), 1).peak_memory


def _requested(which: str) -> int:
    """Bytes that tensors have requested from torch's allocator, before it rounds up."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


@contextmanager
def trainer(config: Config) -> Iterator[Trainer]:
    """Build an engine; its memory is free after the block."""
    from lime_dist.train.build import build_engine

    batches = list(rank_batches(config, 0, 0, 1, config.train.micro_batch_size))
    if on_gpu():
        batches = [(tokens.pin_memory(), labels.pin_memory()) for tokens, labels in batches]
    with groups_of_an_engine():
        with quiet():
            engine, optimizer = build_engine(config, **loss_and_documents(config))
        parts = [Trainer(config, engine, optimizer, batches)]
        del engine, optimizer
        try:
            yield parts[0]
        finally:
            parts.clear()
            gc.collect()
            if on_gpu():
                torch.cuda.empty_cache()


@contextmanager
def groups_of_an_engine() -> Iterator[None]:
    """Destroy the process groups that are made within: with NCCL each takes memory of the GPU."""
    new_group, made = dist.new_group, []

    def remembered(*arguments: Any, **options: Any) -> Any:
        group = new_group(*arguments, **options)
        made.append(group)
        return group

    dist.new_group = remembered
    try:
        yield
    finally:
        dist.new_group = new_group
        for group in reversed(made):
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
