"""One of the two processes of `reduction_cost.py`: run the rounds, write the measurements."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from copying import random_batch
from reduction_cost import STEPS, make_config

from lime_dist.config.schema import Config
from lime_dist.distributed import quiet, start_processes
from lime_dist.pipeline import flat_layout
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.train.build import build_engine
from lime_dist.train.replicas import all_gather, reduce_scatter
from lime_dist.train.stage_optimizer import StageOptimizer


def collectives(elements: int) -> dict[str, Callable[[], Any]]:
    """What can sum or gather a piece over two replicas."""
    rank, half = dist.get_rank(), elements // 2
    flat = torch.ones(2 * half)
    slices = flat.split(half)

    def each(collective: Callable[..., Any]) -> None:
        for owner, part in enumerate(slices):
            collective(part, owner)

    return {
        "all-reduce": lambda: dist.all_reduce(flat),
        "reduce-scatter": lambda: reduce_scatter()(slices[rank], flat),
        "a reduction to each owner": lambda: each(dist.reduce),
        "all-gather": lambda: all_gather()(flat, slices[rank]),
        "a broadcast from each owner": lambda: each(dist.broadcast),
    }


class Subject:
    """A training that times the data-parallel part of its steps."""

    def __init__(self, config: Config, is_early: bool) -> None:
        with quiet():
            self.engine: LimeEngine
            self.engine, self.optimizer = build_engine(config)
        self.seconds: dict[str, list[float]] = {"step": [], "sums": [], "gather": []}
        self._batches = [random_batch(config.train.micro_batch_size, config.data.sequence_length, 4096, "cpu")] * 2
        if not is_early:
            self.optimizer.begin_last_pass = lambda: None  # type: ignore[method-assign]  # so that all sums start after the passes
        self._time("sums", self.optimizer, "reduce_gradients")
        self._time("gather", self.optimizer, "_publish")

    def _time(self, name: str, optimizer: StageOptimizer, method: str) -> None:
        call = getattr(optimizer, method)

        def timed(*arguments: Any) -> None:
            begin = time.perf_counter()
            call(*arguments)
            self.seconds[name].append(time.perf_counter() - begin)

        setattr(optimizer, method, timed)

    def step(self) -> None:
        dist.barrier()
        begin = time.perf_counter()
        self.engine.train_step(iter(self._batches))
        dist.barrier()
        self.seconds["step"].append(time.perf_counter() - begin)

    def result(self) -> dict[str, Any]:
        """Times of all rounds but the first, and what a step exchanges."""
        steps, stats = len(self.seconds["step"]), self.optimizer.replicas.stats
        return {
            **{name: seconds[1:] for name, seconds in self.seconds.items()},
            "calls": stats.calls / steps,
            "summed": stats.gradient_bytes / steps,
            "gathered": stats.weight_bytes / steps,
        }


def main() -> None:
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    start_processes()
    chosen = collectives(settings["elements"])
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(settings["rounds"] + 1):
        for name, collective in chosen.items():
            dist.barrier()
            begin = time.perf_counter()
            collective()
            seconds[name].append(time.perf_counter() - begin)
    flat_layout.PIECE_ELEMENTS = settings["piece"]
    subjects = {name: Subject(make_config(settings, zero), early) for name, (zero, early) in STEPS.items()}
    for _ in range(settings["rounds"] + 1):
        for subject in subjects.values():
            subject.step()
    result = {
        "collectives": {name: times[1:] for name, times in seconds.items()},
        "steps": {name: subject.result() for name, subject in subjects.items()},
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
