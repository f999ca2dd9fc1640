"""Measure how many workers one parent of `data_tools.pretokenize` can feed.

    python benchmarks/pretokenize_parent.py --output runs/pretokenize-parent

The parent's own loop runs, with its queues, shared progress, renames, records and fsyncs, as for 64 workers. But its workers are two
processes that answer at once, with shards of one document. So the parent is the limit, and the units that it takes per second, times
the text of a unit, are what it could take from real workers. A unit holds up to 256 MiB of text (--shard-tokens), and 1/64 of the
input if that is less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from results import write

from data_tools.pretokenize import pool
from data_tools.pretokenize.encoding import SPLITS, Layout, ShardSeries
from data_tools.pretokenize.manifest import Manifest
from data_tools.pretokenize.pool import Progress, UnitPool
from data_tools.pretokenize.units import Unit
from data_tools.sources.inputs import InputFile
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path

ANSWERING = 2  # processes


class Answer:
    """A task that answers at once with one shard of one document for each of two splits, not synced to disk."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def prepare(self) -> None:
        """Make fsync do nothing in this process: the disk is the parent's."""
        os.fsync = lambda fd: None

    def __call__(self, unit: Unit, progress: Progress) -> dict[str, Any]:
        shards: dict[str, Any] = {split: [] for split in SPLITS}
        for split in ("train", "validation"):
            layout = Layout(0.01, 0.0, 1 << 26, None, False, True)
            series = ShardSeries(self._scratch, layout, unit.index, split, np.dtype("<u2"))
            series.add(np.arange(8, dtype="<u2"), unit.text_bytes)
            series.close()
            shards[split] = series.shards
        progress.add(unit.text_bytes, 8)
        counts = dict.fromkeys(("rows", "null", "empty", "filtered", "duplicates"), 0)
        return {"unit": unit.index, **counts, "rejected": [], "shards": shards, "encoder": "gigatoken"}


def few(workers: int, *rest: Any) -> ProcessPoolExecutor:
    """An executor with few processes, whatever the parent asks for."""
    return ProcessPoolExecutor(min(workers, ANSWERING), *rest)


class Clock:
    """Publishes results, and measures from the first one on: start-up does not count."""

    def __init__(self, manifest: Manifest, scratch: Path) -> None:
        self._manifest, self._scratch = manifest, scratch
        self.begin = self.end = self.used = self.published = 0.0
        self.units = -1

    def __call__(self, result: Any) -> None:
        before = time.perf_counter()
        self._manifest.publish(result, self._scratch)
        self.end = time.perf_counter()
        if self.units < 0:
            self.begin, self.used = self.end, time.process_time()
        else:
            self.published += self.end - before
        self.units += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=user_path, required=True, help="folder for the shards and the table")
    parser.add_argument("--units", type=int, default=2000, help="units to take (default 2000)")
    parser.add_argument("--speed", type=float, default=40.0, help="MB/s of text of one real worker (default 40)")
    arguments = parser.parse_args()
    if min(arguments.units, arguments.speed) <= 0:
        raise LimeError("--units and --speed must be above 0")
    pool.ProcessPoolExecutor = few  # type: ignore[misc,assignment]  # the class of the pool, replaced by a function
    lines = [
        "| workers, as the parent sees it | units/s | ms per unit | of them renames, records and fsync | CPU ms per unit | "
        "workers that it feeds | by its CPU time alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for workers in (2, 64):
        folder = arguments.output / f"shards-{workers}"
        shutil.rmtree(folder, ignore_errors=True)
        scratch = folder / "scratch"
        scratch.mkdir(parents=True)
        manifest = Manifest(folder, {"settings": {}, "inputs": []}, fresh=True)
        manifest.write([])
        file = InputFile("none.parquet", "none.parquet")
        units = [Unit(number, ((file, (number, number + 1)),), 256 << 20) for number in range(arguments.units)]
        clock = Clock(manifest, scratch)
        UnitPool(Answer(scratch), workers, "simulated").run(units, units, clock)
        used, seconds = (time.process_time() - clock.used) / clock.units, (clock.end - clock.begin) / clock.units
        fed = [(256 << 20) / 1e6 / arguments.speed / each for each in (seconds, used)]
        lines.append(
            f"| {workers} | {1 / seconds:,.0f} | {seconds * 1e3:.2f} | {clock.published / clock.units * 1e3:.2f} | "
            f"{used * 1e3:.2f} | {fed[0]:,.0f} | {fed[1]:,.0f} |"
        )
        shutil.rmtree(folder)
    table = "\n".join(lines) + "\n"
    write(arguments.output / "table.md", table)
    print(table)


if __name__ == "__main__":
    run_command(main)
