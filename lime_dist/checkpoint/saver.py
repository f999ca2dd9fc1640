"""Writing a run's checkpoints: beside, hashed and durable first, then named, then pointed at; at once or in the background.

    .global_step100.partial/    every owner writes its file here and makes it durable
    global_step100/             rank 0 adds the manifest when all have, and renames the folder
    latest                      is replaced last, atomically, by rank 0

A kill at any moment leaves a checkpoint whole or absent. Only then are old ones deleted: renamed to a hidden name first.

In the background (``checkpoint.asynchronous``) training waits while the state is copied to host memory, and a thread does
the rest; the name is given at a later step boundary, when all ranks have written. On a GPU the copy is a small part of the
cost. On CPUs it is worth its memory (12 bytes a parameter) where the disk is slow; on a fast one most of the cost is hashing and
copying, which the thread takes from the computation (benchmarks/RESULTS.md). ``saved …`` lines say both costs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

import lime_dist
from lime_dist.checkpoint.manifest import FORMAT, LATEST, MANIFEST, manifest_checksum
from lime_dist.checkpoint.optimizer import CheckpointedOptimizer
from lime_dist.checkpoint.store import folder_name, saved_steps
from lime_dist.config.schema import Config
from lime_dist.data.files import json_bytes, sync_folder, write_atomic
from lime_dist.data.state import TrainState
from lime_dist.distributed import agree, is_main_process
from lime_dist.errors import LimeError

Values = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has its name.

    Attributes:
        blocked: seconds that training waited for it.
        background: seconds that a thread of this rank wrote; 0 if it was saved at once.
        problems: on rank 0, what hindered the deletion of old ones.
    """

    path: Path
    state: TrainState
    blocked: float
    background: float
    problems: tuple[str, ...]


@dataclass
class _Write:
    """This rank's file of a checkpoint under way; ``values`` is None where another rank holds the same."""

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
                self.entry = _write_file(self.partial, self.name, self.values)
        except Exception as error:  # raised, or agreed on, where all ranks wait for it
            self.error = error
        self.values = None  # its memory
        self.seconds = time.perf_counter() - begin


class Saver:
    """Saves the checkpoints of one run, one at a time; every method is called by all ranks together, but ``writing``."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        num_samples: int,
        optimizer: CheckpointedOptimizer,
        stage: int,
        replica: int,
    ) -> None:
        self.directory = directory
        self._config, self._num_samples, self._optimizer = config, num_samples, optimizer
        self._file = f"stage{stage:03d}-replica{replica:03d}.pt"
        self._writes = optimizer.is_sharded or replica == 0
        self._under_way: _Write | None = None

    @property
    def pending(self) -> TrainState | None:
        """The state of which a checkpoint is begun and not finished; the same on all ranks."""
        return None if self._under_way is None else self._under_way.state

    @property
    def writing(self) -> bool:
        """Whether this rank's file of it is not on disk yet."""
        return self._under_way is not None and self._under_way.thread is not None and self._under_way.thread.is_alive()

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is or will be."""
        return self.directory / folder_name(step)

    def save(self, state: TrainState) -> Saved:
        """Begin and finish."""
        self.begin(state)
        return self.finish()

    def begin(self, state: TrainState) -> None:
        """Write this rank's file, or copy the state and let a thread write it; then ``finish`` gives the checkpoint its name.

        Raises:
            LimeError: the folder cannot be made.
        """
        assert self._under_way is None, "a checkpoint is under way"
        begin = time.perf_counter()
        partial = self.directory / f".{folder_name(state.step)}.partial"
        self._together(state, lambda: _prepare(self.directory, partial))
        values = _snapshot(self._optimizer) if self._writes else None
        write = _Write(state, partial, self._file, values, self._optimizer.step_count)
        if self._config.checkpoint.asynchronous:
            write.thread = threading.Thread(target=write.run, name="checkpoint", daemon=True)
            write.thread.start()
        else:
            write.run()
        write.blocked = time.perf_counter() - begin
        self._under_way = write

    def finish(self) -> Saved:
        """Wait until all ranks have written, name the checkpoint, and delete those that need not stay.

        Raises:
            LimeError: some rank could not write; the checkpoint is absent then, and earlier ones are as they were.
        """
        write, self._under_way = self._under_way, None
        assert write is not None, "no checkpoint is under way"
        begin = time.perf_counter()
        if write.thread is not None:
            write.thread.join()
        if write.error is not None and not isinstance(write.error, OSError):
            raise write.error
        final = self.directory / folder_name(write.state.step)
        try:
            agree(_line(write.state, write.error))
            entries: list[dict[str, Any] | None] = [None] * dist.get_world_size()
            dist.all_gather_object(entries, write.entry)
            manifest = self._manifest(write, [entry for entry in entries if entry is not None])
            self._together(write.state, lambda: _publish(write.partial, final, manifest))
        except LimeError:
            if is_main_process():
                shutil.rmtree(write.partial, ignore_errors=True)
            raise
        train = self._config.train
        problems = _prune(self.directory, write.state.step, train.keep_last, train.keep_every)
        blocked = write.blocked + time.perf_counter() - begin
        return Saved(final, write.state, blocked, write.seconds if write.thread is not None else 0.0, problems)

    def _together(self, state: TrainState, action: Callable[[], None]) -> None:
        """Let rank 0 do something to the disk; its failure is a LimeError on all ranks."""
        problem = None
        if is_main_process():
            try:
                action()
            except OSError as error:
                problem = _line(state, error)
        agree(problem)

    def _manifest(self, write: _Write, files: list[dict[str, Any]]) -> dict[str, Any]:
        parallel = self._config.parallel
        manifest = {
            "format": FORMAT,
            "version": lime_dist.__version__,
            "state": write.state.as_dict(),
            "optimizer_steps": write.optimizer_steps,
            "num_samples": self._num_samples,
            "config": self._config.model_dump(mode="json"),
            "layout": {
                "pipeline_stages": parallel.pipeline_stages,
                "replicas": dist.get_world_size() // parallel.pipeline_stages,
                "zero_stage": parallel.zero_stage,
            },
            "files": files,
        }
        return {**manifest, "checksum": manifest_checksum(manifest)}


def _line(state: TrainState, error: OSError | None) -> str | None:
    if error is None:
        return None
    return f"cannot write the checkpoint of step {state.step}: {error}; earlier checkpoints are untouched"


def _prepare(directory: Path, partial: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".global_step*"):  # of a process that was killed
        shutil.rmtree(leftover)
    for leftover in directory.glob(f".{LATEST}.*"):
        leftover.unlink()
    partial.mkdir()


def _snapshot(optimizer: CheckpointedOptimizer) -> Values:
    """A copy in host memory of what this rank owns."""
    return {
        name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in optimizer.state(name).items()}
        for name in optimizer.owned_names()
    }


class _HashedFile:
    """What torch.save writes to: hashes on the way, so that nothing is read again, and remembers why a write failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _write_file(folder: Path, name: str, values: Values) -> dict[str, Any]:
    with (folder / name).open("wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save(values, cast(IO[bytes], hashed))  # write and flush are all that it needs
        except (OSError, RuntimeError):  # torch makes a RuntimeError of a write that failed
            if hashed.error is not None:
                raise hashed.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    first = next(iter(values.values()))["weight"]
    return {
        "file": name,
        "bytes": hashed.size,
        "sha256": hashed.digest.hexdigest(),
        "dtype": str(first.dtype).removeprefix("torch."),
        "parameters": {owned: list(state["weight"].shape) for owned, state in values.items()},
    }


def _publish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Name a checkpoint, then point ``latest`` at it; absent if either fails."""
    write_atomic(partial / MANIFEST, json_bytes(manifest))
    _delete(final)  # a damaged one of this step, or one that the run went back behind
    partial.rename(final)
    try:
        sync_folder(final.parent)
        write_atomic(final.parent / LATEST, f"{final.name}\n".encode())
    except OSError:
        _delete(final)
        raise


def _prune(directory: Path, newest: int, keep_last: int | None, keep_every: int | None) -> tuple[str, ...]:
    """Delete, on rank 0, checkpoints up to the newest that need not stay; a line for each that could not be deleted."""
    if keep_last is None or not is_main_process():
        return ()
    problems = []
    for step in [step for step in saved_steps(directory) if step <= newest][:-keep_last]:
        if keep_every is None or step % keep_every:
            try:
                _delete(directory / folder_name(step))
            except OSError as error:
                problems.append(f"cannot delete {directory / folder_name(step)}: {error}")
    return tuple(problems)


def _delete(path: Path) -> None:
    """Delete a folder, if it is there, so that a kill midway leaves nothing under its name."""
    hidden = path.with_name(f".{path.name}.deleted")
    if path.exists():
        path.rename(hidden)
        shutil.rmtree(hidden)
