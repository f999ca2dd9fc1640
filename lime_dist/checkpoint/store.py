"""Layout-free checkpoints: by exported name the weight, both moments and the step, whole or absent, loadable by any layout.

    checkpoints/global_step100/manifest.json     step, consumed samples, model, index of names, size and SHA-256 per file
    checkpoints/global_step100/stage000-replica000.pt   {name: {weight, exp_avg, exp_avg_sq}} of one owner

Every owner writes its file into a hidden folder; when all files are on disk, rank 0 writes the manifest and renames the
folder. A folder whose manifest or files do not verify is passed over in favour of the newest one before it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

import lime_dist
from lime_dist.config.schema import Config
from lime_dist.data.files import json_bytes, sha256_file, sync_folder, write_atomic
from lime_dist.distributed import agree, is_main_process
from lime_dist.train.optim import StageOptimizer
from lime_dist.train.state import TrainState

MANIFEST = "manifest.json"
_NAME = re.compile(r"global_step(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def state(self) -> TrainState:
        return TrainState(**self.manifest["state"])


def save(
    directory: Path, config: Config, optimizer: StageOptimizer, state: TrainState, stage: int, replica: int
) -> Path:
    """Write ``directory/global_stepN``; called by all ranks together; returns the folder.

    Raises:
        LimeError: some rank could not write; nothing stands under the final name then.
    """
    final = directory / f"global_step{state.step}"
    partial = directory / f".global_step{state.step}.partial"
    agree(_attempt(lambda: _prepare(directory, partial)) if is_main_process() else None)
    entry: dict[str, Any] | None = None

    def write() -> None:
        nonlocal entry
        entry = _write_file(partial, f"stage{stage:03d}-replica{replica:03d}.pt", optimizer)

    writes = optimizer.zero or replica == 0
    agree(_attempt(write) if writes else None)
    entries: list[dict[str, Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(entries, entry)
    files = [found for found in entries if found is not None and found["parameters"]]
    agree(_attempt(lambda: _publish(partial, final, config, state, files)) if is_main_process() else None)
    return final


def find_newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint in a folder, and a line for each newer one that was passed over; called by all ranks.

    Every rank reads the manifest; the hashes of the files are shared out over the ranks.
    """
    passed: list[str] = []
    steps = sorted((int(m[1]) for p in directory.glob("global_step*") if (m := _NAME.fullmatch(p.name))), reverse=True)
    for step in _same_everywhere(steps):
        path = directory / f"global_step{step}"
        problem = _first_problem(path)
        if problem is None:
            return Checkpoint(path, json.loads((path / MANIFEST).read_text())), passed
        passed.append(f"{path}: {problem}; passed over")
    return None, passed


def load(checkpoint: Checkpoint, config: Config, optimizer: StageOptimizer) -> None:
    """Read this rank's share of a checkpoint into the optimizer and the weights; called by all ranks together.

    Raises:
        LimeError: the checkpoint is of another model, or of other data.
    """
    index: dict[str, dict[str, Any]] = {}
    for entry in checkpoint.manifest["files"]:
        for name, shape in entry["parameters"].items():
            index[name] = {"file": entry["file"], "shape": shape}
    agree(_mismatch(checkpoint, config, optimizer, index))
    opened: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    with torch.no_grad():
        for name in optimizer.local_names():
            file = index[name]["file"]
            if file not in opened:
                opened[file] = torch.load(checkpoint.path / file, map_location="cpu", weights_only=True, mmap=True)
            for key, target in optimizer.state(name).items():
                target.copy_(opened[file][name][key])
    optimizer.restore_finished(checkpoint.manifest["optimizer_steps"])


def _prepare(directory: Path, partial: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".global_step*"):
        shutil.rmtree(leftover)
    partial.mkdir()


def _write_file(folder: Path, name: str, optimizer: StageOptimizer) -> dict[str, Any]:
    values = {
        owned: {key: tensor.detach().cpu().clone() for key, tensor in optimizer.state(owned).items()}
        for owned in optimizer.owned_names()
    }
    if not values:
        return {"parameters": {}}
    path = folder / name
    with path.open("wb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())
    return {
        "file": name,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "parameters": {owned: list(value["weight"].shape) for owned, value in values.items()},
        "optimizer_steps": optimizer.step_count,
    }


def _publish(partial: Path, final: Path, config: Config, state: TrainState, files: list[dict[str, Any]]) -> None:
    steps = {entry.pop("optimizer_steps") for entry in files}
    assert len(steps) == 1, f"ranks disagree on the number of updates: {steps}"
    manifest = {
        "version": lime_dist.__version__,
        "state": state.as_dict(),
        "optimizer_steps": steps.pop(),
        "config": config.model_dump(mode="json"),
        "world_size": dist.get_world_size(),
        "files": files,
    }
    write_atomic(partial / MANIFEST, json_bytes(manifest))
    if final.exists():  # an earlier, damaged one of this step
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)


def _attempt(action: Any) -> str | None:
    """Run an action that touches the disk; its failure as one line."""
    try:
        action()
    except OSError as error:
        return f"cannot write the checkpoint: {error}; earlier checkpoints are untouched"
    return None


def _first_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, the same answer on every rank."""
    problem = None
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        rank, size = dist.get_rank(), dist.get_world_size()
        for entry in files[rank::size]:
            file = path / entry["file"]
            if not file.is_file():
                problem = f"{entry['file']} is missing"
            elif file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
                problem = f"{entry['file']} is damaged"
    except OSError:
        problem = f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError):
        problem = f"{MANIFEST} is damaged"
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next((line for line in found if line is not None), None)


def _same_everywhere(steps: list[int]) -> list[int]:
    shared: list[Any] = [steps]
    dist.broadcast_object_list(shared, src=0)
    return list(shared[0])


def _mismatch(
    checkpoint: Checkpoint, config: Config, optimizer: StageOptimizer, index: dict[str, dict[str, Any]]
) -> str | None:
    """Why this checkpoint cannot continue this run, or None."""
    advice = "give another run.directory, or the settings that the run was started with"
    try:
        saved = Config.model_validate(checkpoint.manifest["config"])
    except ValidationError:
        return f"{checkpoint.path} was written with settings that this version does not know; {advice}"
    differences = [
        f"{section}.{key}: {there[key]} there, {here[key]} here"
        for section, there, here in (
            ("model", _canonical(saved), _canonical(config)),
            ("data", _order_settings(saved), _order_settings(config)),
        )
        for key in here
        if there[key] != here[key]
    ]
    if differences:
        return f"{checkpoint.path} is of another run ({', '.join(differences)}); {advice}"
    for name, parameter in optimizer.parameters.items():
        if name not in index or index[name]["shape"] != list(parameter.shape):
            return f"{checkpoint.path} has no {name} of shape {list(parameter.shape)}; {advice}"
    return None


def _canonical(config: Config) -> dict[str, Any]:
    return {**config.model.model_dump(mode="json"), "num_key_value_heads": config.model.key_value_heads}


def _order_settings(config: Config) -> dict[str, Any]:
    """What decides which samples come when; another path may hold the same data."""
    return {"sequence_length": config.data.sequence_length, "seed": config.data.seed}
