"""One of the two processes of `planning.py`: build every setting, run the rounds, write the measurements."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from pipeline_worker import link_speed, micro_batches
from planning import SETTINGS, make_config

from lime_dist.config.schema import Config
from lime_dist.distributed import quiet, start_processes
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.train.build import build_engine


def seconds_of_step(engine: LimeEngine, config: Config) -> float:
    """Run one step on both processes."""
    shape = {
        "batch": config.train.micro_batch_size,
        "length": config.data.sequence_length,
        "vocabulary": config.model.vocab_size,
    }
    dist.barrier()
    begin = time.perf_counter()
    engine.train_step(micro_batches(shape))
    dist.barrier()
    return time.perf_counter() - begin


def memory_speed() -> float:
    """Return the bytes per second that a process moves while both copy."""
    source = torch.ones(1 << 24)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        dist.barrier()
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return 2 * source.nbytes / statistics.median(seconds)


def main() -> None:
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    start_processes()
    rank = dist.get_rank()
    bandwidth, latency = link_speed(rank)
    memory_bandwidth = memory_speed()
    configs = {name: make_config(settings, name) for name in SETTINGS}
    engines: dict[str, LimeEngine] = {}
    for name, config in configs.items():
        with quiet():
            engines[name], _ = build_engine(config)
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    names = list(configs)
    for turn in range(settings["rounds"] + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = seconds_of_step(engines[name], configs[name])
            if rank == 0:
                print(f"{settings['link']}: round {turn} of {settings['rounds']}: {name} {taken:.2f} s", flush=True)
            if turn > 0:
                seconds[name].append(taken)
    speeds = {"bandwidth": bandwidth, "latency": latency, "memory_bandwidth": memory_bandwidth}
    result = {**speeds, "seconds": seconds}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()


if __name__ == "__main__":
    main()
