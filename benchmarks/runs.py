"""Run many trainings that differ in a few settings, each in its own folder, resumable, several at the same time.

A run is `pretrain.py` in one process per stage, with one thread each. A run that has its final validation is not repeated, and a stopped
one resumes from its checkpoint, so the same command finishes the rest.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kept import KeptRuns

from lime_dist import load_config
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError
from lime_dist.paths import user_path

ROOT = Path(__file__).resolve().parents[1]
_writes_kept_runs = threading.Lock()


@functools.cache
def _load(config: Path, overrides: tuple[str, ...]) -> Config:
    return load_config(config, list(overrides))


def add_options(parser: argparse.ArgumentParser, steps: int, data_is_optional: bool = False) -> None:
    """Add the options of a study on given data.

    Args:
        data_is_optional: the study can be read from kept runs, and then needs no data.
    """
    parser.add_argument(
        "--data", required=not data_is_optional, type=user_path,
        help="folder with dataset.json" + ("; without it, nothing is trained" if data_is_optional else ""),
    )  # fmt: skip
    parser.add_argument(
        "--config", default=ROOT / "configs/quickstart.yaml", type=user_path, help="configuration that all runs share"
    )
    add_run_options(parser, steps)


def add_run_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """Add the options of every study."""
    parser.add_argument(
        "--output", required=True, type=user_path, help="folder for the runs, the table and the picture"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    parser.add_argument("--minutes", type=float, help="start no run after this many minutes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


@dataclass(frozen=True)
class Study:
    """Runs of every variant from every seed, seed by seed, so that variants can be compared at any time.

    Attributes:
        shared: overrides of the configuration for all runs.
        variants: the overrides of each variant, by name.
        kept: a file of finished runs, which are not repeated, and to which others are added.
        only_reads: start no run.
        deadline: start no run after this moment of :func:`time.monotonic`.
    """

    config: Path
    output: Path
    shared: Sequence[str]
    variants: dict[str, list[str]]
    seeds: Sequence[int]
    steps: int
    kept: KeptRuns | None = None
    only_reads: bool = False
    deadline: float = math.inf
    _known: set[Path] = field(default_factory=set, repr=False, compare=False)
    """Folders of finished runs that have been named; copies by `dataclasses.replace` share it."""

    @classmethod
    def from_options(
        cls, arguments: argparse.Namespace, shared: Sequence[str], variants: dict[str, list[str]]
    ) -> Study:
        overrides = [*shared, *arguments.overrides, f"train.steps={arguments.steps}"]
        if arguments.data is not None:
            overrides.append(f"data.path={arguments.data.resolve()}")
        deadline = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
        output = arguments.output.resolve()
        study = cls(arguments.config, output, overrides, variants, arguments.seeds, arguments.steps, deadline=deadline)
        for name in variants:
            study.model(name)  # report mistakes before anything runs
        study.output.mkdir(parents=True, exist_ok=True)
        return study

    def model(self, name: str) -> Config:
        """Return the configuration of a variant, without seeds and folder."""
        return _load(self.config, (*self.shared, *self.variants[name]))

    def folder(self, name: str, seed: int) -> Path:
        return self.output / f"{name}-seed{seed}"

    def run(self, jobs: int) -> None:
        """Run what is not finished, ``jobs`` runs at a time."""
        pairs = [(name, seed) for seed in self.seeds for name in self.variants]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda pair: self._run(*pair), pairs))

    def _run(self, name: str, seed: int) -> None:
        directory = self.folder(name, seed)
        overrides = [
            *self.shared, *self.variants[name], f"train.seed={seed}", f"data.seed={seed}", f"run.directory={directory}",
        ]  # fmt: skip
        written = directory / "config.yaml"
        if not self.only_reads and written.exists() and load_config(written) != load_config(self.config, overrides):
            raise LimeError(f"{directory} holds a run with other settings; give another --output, or delete it")
        if self.validation(name, seed) is not None:
            if directory not in self._known:
                print(f"{directory.name}: already finished", flush=True)
            self._known.add(directory)
            self._keep(name, seed)
            return
        if self.only_reads:
            raise LimeError(f"{directory.name} is not among the finished runs; give --data, to train it")
        if time.monotonic() > self.deadline:
            print(f"{directory.name}: not started, no time left", flush=True)
            return
        begin = time.perf_counter()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        }
        stages = self.model(name).parallel.pipeline_stages
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={stages}"] if stages > 1 else []
        script = str(ROOT / "pretrain.py")
        command = [sys.executable, *torchrun, script, "--config", str(self.config), *overrides]
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if finished.returncode:
            last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise LimeError(f"{directory.name} ended with status {finished.returncode}: {last}")
        print(f"{directory.name}: {time.perf_counter() - begin:.0f} s", flush=True)
        self._known.add(directory)
        self._keep(name, seed)

    def _keep(self, name: str, seed: int) -> None:
        if self.kept is not None:
            with _writes_kept_runs:
                self.kept.add(name, self.model(name), seed, self.records(name, seed))

    def records(self, name: str, seed: int) -> list[dict[str, float]]:
        """Return the records of a run's metrics.jsonl; of a run that was kept, those with a validation loss."""
        if self.kept is not None and (kept := self.kept.records(self.model(name), seed)):
            return kept
        path = self.folder(name, seed) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def validations(self, name: str, seed: int) -> list[dict[str, float]]:
        """Return the records of a run that have a validation loss."""
        return [record for record in self.records(name, seed) if "validation_loss" in record]

    def validation(self, name: str, seed: int) -> float | None:
        """Return the validation loss after the last step, or None if the run has not finished."""
        for record in self.validations(name, seed):
            if record["step"] == self.steps:
                return record["validation_loss"]
        return None

    def finished_seeds(self) -> list[int]:
        """Return the seeds that every variant has finished."""
        return [seed for seed in self.seeds if all(self.validation(name, seed) is not None for name in self.variants)]

    def losses(self, name: str, seeds: Sequence[int]) -> list[float]:
        """Return the validation losses of a variant's runs, all of which must have finished."""
        losses = [self.validation(name, seed) for seed in seeds]
        return [loss for loss in losses if loss is not None]
