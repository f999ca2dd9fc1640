"""Measure how many samples per second the training stream reads from the page cache, on one core.

    python benchmarks/loading.py --output runs/loading

A sample is 2,049 uint16 tokens at a random position, returned as int64 (tokens, labels) of 2,048 each in micro-batches. The benchmark
measures reading alone and the whole stream with its read-ahead thread, bound to one core, by CPU time. For comparison, numpy copies as many
bytes from the same file in order and widens them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from results import write

from lime_dist.data.dataset import TokenSplit
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.loader import TrainBatches, read_batch
from lime_dist.data.order import SampleOrder
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path

LENGTH = 2048


def rate(work: Callable[[int], None], samples: int, repeats: int) -> float:
    """Return the median number of samples per second of CPU time, all threads included."""
    rates = []
    for _ in range(repeats):
        begin = time.process_time()
        work(samples)
        rates.append(samples / (time.process_time() - begin))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=user_path, required=True, help="folder for the data and the table")
    parser.add_argument("--megabytes", type=int, default=800, help="megabytes of tokens (default 800)")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples in a micro-batch (default 8)")
    parser.add_argument("--samples", type=int, default=100_000, help="samples per measurement (default 100000)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements (default 5)")
    arguments = parser.parse_args()
    if min(arguments.megabytes, arguments.micro_batch, arguments.samples, arguments.repeats) < 1:
        raise LimeError("every number must be at least 1")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    prefix = arguments.output / f"tokens-{arguments.megabytes}"
    if not prefix.with_suffix(".idx").exists():
        generator = np.random.default_rng(0)
        with IndexedWriter(prefix, np.uint16) as writer:
            for _ in range(arguments.megabytes):
                writer.add_document(generator.integers(0, 50000, 500_000).astype(np.uint16))
    split = TokenSplit(prefix, "train", 0.01)
    order, batch = SampleOrder(0, split.num_samples(LENGTH)), arguments.micro_batch

    def reading(samples: int) -> None:
        for chosen in order.samples_at(np.arange(samples).reshape(-1, batch)):
            read_batch(split, chosen, LENGTH)

    def streaming(samples: int) -> None:
        stream = TrainBatches(split, order, LENGTH, 64 * batch, batch, 0, 1)
        for _ in range(samples // batch):
            next(stream)
        stream.close()

    def least(samples: int) -> None:
        rows = np.empty((batch, LENGTH + 1), dtype=np.int64)
        for first in range(0, samples, batch):
            for row, i in enumerate(range(first, first + batch)):
                rows[row] = split.sample(i % order.num_samples, LENGTH)

    samples = arguments.samples // batch * batch
    reading(order.num_samples // batch * batch)  # into the page cache
    lines = ["| on one core | samples/s | tokens/s |", "|---|---|---|"]
    cases = [("in order, widened only", least), ("read at random", reading), ("the training stream", streaming)]
    for name, work in cases:
        speed = rate(work, samples, arguments.repeats)
        lines.append(f"| {name} | {speed:,.0f} | {speed * LENGTH:,.0f} |")
    table = "\n".join(lines) + "\n"
    write(arguments.output / "table.md", table)
    print(table)


if __name__ == "__main__":
    run_command(main)
