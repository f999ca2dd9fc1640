"""Saving the checkpoints of a run: all ranks write their files, rank 0 names the checkpoint and deletes old ones.

Every owner of parameters writes one file (`folder.write_tensors`). When all have, rank 0 adds the manifest, names the folder
and points ``latest`` at it. Only then are old checkpoints deleted.

In the background (``checkpoint.asynchronous``) training waits only while the state is copied to host memory; a thread writes
the file. The checkpoint gets its name at a later step end, when all ranks have written. On a GPU the copy is a small part of
the cost. On CPUs the copy (12 bytes per parameter with AdamW) pays off where the disk is slow; on a fast disk most of the cost
is hashing and copying, for which the thread competes with training (benchmarks/RESULTS.md). The lines ``saved …`` give both
costs.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lime_dist.checkpoint.folder import (
    Values,
    delete,
    file_name,
    folder_name,
    partial_folder,
    publish,
    write_tensors,
)
from lime_dist.checkpoint.manifest import BEST, LATEST, make_manifest, read_best
from lime_dist.checkpoint.optimizer import CheckpointedOptimizer
from lime_dist.checkpoint.store import saved_steps
from lime_dist.config.schema import Config
from lime_dist.data.files import free_name, remove, write_atomic
from lime_dist.data.identity import DataIdentity
from lime_dist.data.state import TrainState
from lime_dist.distributed import agree, from_main_process
from lime_dist.errors import LimeError
from lime_dist.launchers import is_main_process


@dataclass(frozen=True)
class Saved:
    """A finished checkpoint.

    Attributes:
        blocked: seconds that training waited for it.
        background: seconds that a thread of this rank wrote; 0 without a thread.
        problems: on rank 0, one line for each path that could not be deleted and was not named before.
    """

    path: Path
    state: TrainState
    blocked: float
    background: float
    problems: tuple[str, ...]


@dataclass
class _Write:
    """This rank's file of the checkpoint in progress; ``values`` is None if another rank writes the same."""

    state: TrainState
    partial: Path
    name: str
    values: Values | None
    optimizer_steps: int
    blocked: float = 0.0
    seconds: float = 0.0
    entry: dict[str, Any] | None = None
    error: Exception | None = None
    thread: threading.Thread | None = None

    def run(self) -> None:
        begin = time.perf_counter()
        try:
            if self.values:
                self.entry = write_tensors(self.partial, self.name, self.values)
        except Exception as error:  # `Saver.finish` raises it, where all ranks wait
            self.error = error
        self.values = None  # frees the copy
        self.seconds = time.perf_counter() - begin


class Saver:
    """Saves the checkpoints of one run, one at a time. All ranks call every method together; ``writing`` is local.

    Args:
        directory: folder of the run's checkpoints.
        data: the training data.
        stage: this rank's pipeline stage.
        replica: this rank's data-parallel replica.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        data: DataIdentity,
        optimizer: CheckpointedOptimizer,
        stage: int,
        replica: int,
    ) -> None:
        self.directory = directory
        self._config, self._data, self._optimizer = config, data, optimizer
        self._file = file_name(stage, replica)
        self._writes = optimizer.is_sharded or replica == 0
        self._in_progress: _Write | None = None
        self._left: list[str] = []  # what could not be deleted since the last checkpoint, on rank 0
        self._told: set[str] = set()

    @property
    def pending(self) -> TrainState | None:
        """The state whose checkpoint has been started and not finished, the same on all ranks; None if there is none."""
        return None if self._in_progress is None else self._in_progress.state

    @property
    def writing(self) -> bool:
        """Whether a thread of this rank still writes its file."""
        write = self._in_progress
        return write is not None and write.thread is not None and write.thread.is_alive()

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is or will be."""
        return self.directory / folder_name(step)

    def save(self, state: TrainState) -> Saved:
        """Save a checkpoint: `begin` and `finish`."""
        self.begin(state)
        return self.finish()

    def improves(self, validation_loss: float) -> bool:
        """Whether a validation loss is lower than that of the best checkpoint, the same answer on all ranks.

        Of two equal ones the earlier checkpoint stays the best.
        """
        best = from_main_process(read_best(self.directory))
        return math.isfinite(validation_loss) and (best is None or validation_loss < best[1])

    def mark_best(self, state: TrainState, validation_loss: float) -> None:
        """Name the saved checkpoint of ``state`` as the best one; it is kept until another takes its place.

        Raises:
            LimeError: the file ``best`` cannot be written.
        """
        text = f"{folder_name(state.step)} {validation_loss!r}\n"
        self._on_main_process(state, lambda: write_atomic(self.directory / BEST, text.encode()))

    def begin(self, state: TrainState) -> None:
        """Write this rank's file, or copy the state and start a thread that writes it. `finish` must follow.

        Raises:
            LimeError: the folder cannot be made.
        """
        assert self._in_progress is None, "a checkpoint is in progress"
        begin = time.perf_counter()
        partial = self._prepare(state)
        values = self._optimizer.saved_state() if self._writes else None
        write = _Write(state, partial, self._file, values, self._optimizer.step_count)
        if self._config.checkpoint.asynchronous:
            write.thread = threading.Thread(target=write.run, name="checkpoint", daemon=True)
            write.thread.start()
        else:
            write.run()
        write.blocked = time.perf_counter() - begin
        self._in_progress = write

    def finish(self) -> Saved:
        """Wait until all ranks have written, name the checkpoint, and delete old ones.

        Raises:
            LimeError: a rank could not write. The checkpoint is absent then, and earlier ones are unchanged.
        """
        write, self._in_progress = self._in_progress, None
        assert write is not None, "no checkpoint is in progress"
        begin = time.perf_counter()
        if write.thread is not None:
            write.thread.join()
        if write.error is not None and not isinstance(write.error, OSError):
            raise write.error
        final = self.directory / folder_name(write.state.step)
        try:
            agree(_problem(write.state, write.error))
            entries: list[dict[str, Any] | None] = [None] * dist.get_world_size()
            dist.all_gather_object(entries, write.entry)
            manifest = make_manifest(
                self._config,
                write.state,
                optimizer_steps=write.optimizer_steps,
                data=self._data,
                layout=self._layout(),
                files=[entry for entry in entries if entry is not None],
            )
            self._on_main_process(write.state, lambda: publish(write.partial, final, manifest))
        except LimeError:
            if is_main_process():
                remove(write.partial)  # what is left of it is named when the next checkpoint begins
            raise
        train = self._config.train
        self._left += _prune(self.directory, write.state.step, train.keep_last, train.keep_every)
        blocked = write.blocked + time.perf_counter() - begin
        background = write.seconds if write.thread is not None else 0.0
        return Saved(final, write.state, blocked, background, self._new_problems())

    def _prepare(self, state: TrainState) -> Path:
        """Make the folder for a new checkpoint on rank 0, which deletes what it can of what earlier saves left."""
        chosen: list[Path] = [partial_folder(self.directory, state.step)]

        def make() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in (*self.directory.glob(".global_step*"), *self.directory.glob(f".{LATEST}.*")):
                if (problem := remove(leftover)) is not None:
                    self._left.append(problem)
            chosen[0] = free_name(chosen[0])
            chosen[0].mkdir()

        self._on_main_process(state, make)
        return from_main_process(chosen[0])

    def _new_problems(self) -> tuple[str, ...]:
        """A line for each path that could not be deleted and was not named before."""
        new = [problem for problem in dict.fromkeys(self._left) if problem not in self._told]
        self._told.update(new)
        self._left.clear()
        return tuple(f"warning: cannot delete {problem}; delete it yourself, saving goes on without" for problem in new)

    def _layout(self) -> dict[str, int]:
        parallel = self._config.parallel
        return {
            "pipeline_stages": parallel.pipeline_stages,
            "replicas": dist.get_world_size() // parallel.pipeline_stages,
            "zero_stage": parallel.zero_stage,
        }

    def _on_main_process(self, state: TrainState, action: Callable[[], None]) -> None:
        """Run ``action`` on rank 0; an OSError there is a LimeError on all ranks."""
        problem = None
        if is_main_process():
            try:
                action()
            except OSError as error:
                problem = _problem(state, error)
        agree(problem)


def _problem(state: TrainState, error: OSError | None) -> str | None:
    if error is None:
        return None
    return f"cannot write the checkpoint of step {state.step}: {error}; earlier checkpoints are untouched"


def _prune(directory: Path, newest: int, keep_last: int | None, keep_every: int | None) -> list[str]:
    """Delete, on rank 0, the checkpoints up to step ``newest`` that are not kept; returns what cannot be deleted, and why."""
    if keep_last is None or not is_main_process():
        return []
    problems = []
    best = read_best(directory)
    for step in [step for step in saved_steps(directory) if step <= newest][:-keep_last]:
        if (keep_every is None or step % keep_every) and (best is None or step != best[0]):
            try:
                problems.append(delete(directory / folder_name(step)))
            except OSError as error:
                problems.append(f"{directory / folder_name(step)}: {error.strerror or error}")
    return [problem for problem in problems if problem is not None]
