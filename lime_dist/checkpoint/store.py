"""Layout-free checkpoints on disk: by exported name the weight, both moments and the step; found, verified and read.

    checkpoints/latest                           the name of the folder that a run goes on from
    checkpoints/global_step100/manifest.json     step, consumed samples, configuration, layout; size, SHA-256 and names per file
    checkpoints/global_step100/stage000-replica000.pt   {name: {weight, exp_avg, exp_avg_sq}} of one owner

Which one a run goes on from: the one that ``latest`` names if it is whole, else the newest whole one; whatever is passed over
gets a line. Writing another name into ``latest`` goes back to that one. Whole means: the manifest makes sense, every file has
its size and hash, and holds the tensors that the manifest says. Files are read as tensors alone, never as objects.
`saver.py` writes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from lime_dist.checkpoint.manifest import LATEST, MANIFEST, STATES, read_manifest
from lime_dist.checkpoint.optimizer import CheckpointedOptimizer
from lime_dist.config.schema import Config
from lime_dist.data.files import sha256_file
from lime_dist.data.state import TrainState
from lime_dist.distributed import agree

_NAME = re.compile(r"global_step(0|[1-9]\d*)")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def state(self) -> TrainState:
        return TrainState(**self.manifest["state"])


def folder_name(step: int) -> str:
    return f"global_step{step}"


def saved_steps(directory: Path) -> list[int]:
    """The steps of which there are folders, whole or not, ascending."""
    return sorted(int(match[1]) for path in directory.glob("global_step*") if (match := _NAME.fullmatch(path.name)))


def find_newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, and lines about those that were passed over; called by all ranks together.

    Every rank reads the manifest; the files are shared out over the ranks to be verified.
    """
    lines: list[str] = []
    steps, named, problem = _same_everywhere(_candidates(directory))
    if problem is not None:
        lines.append(f"{directory / LATEST} {problem}; looking for the newest whole checkpoint")
    for step in ([] if named is None else [named]) + [step for step in reversed(steps) if step != named]:
        path = directory / folder_name(step)
        problem, manifest = _verify(path, step)
        if problem is None:
            if step == named and step < steps[-1]:
                lines.append(
                    f"{directory / LATEST} names {path.name}; the newer {folder_name(steps[-1])} is left aside"
                )
            return Checkpoint(path, manifest), lines
        lines.append(f"{path}: {problem}; passed over")
    return None, lines


def load(checkpoint: Checkpoint, config: Config, num_samples: int, optimizer: CheckpointedOptimizer) -> None:
    """Read this rank's share of a checkpoint into the optimizer and the weights; called by all ranks together.

    Args:
        num_samples: of the training split; the order of samples is a function of it.

    Raises:
        LimeError: the checkpoint is of another model, or of other data; nothing has been loaded then.
    """
    index: dict[str, dict[str, Any]] = {}
    for entry in checkpoint.manifest["files"]:
        for name, shape in entry["parameters"].items():
            index[name] = {"file": entry["file"], "shape": shape}
    agree(_mismatch(checkpoint, config, num_samples, optimizer, index))
    opened: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    with torch.no_grad():
        for name in optimizer.local_names():
            file = index[name]["file"]
            if file not in opened:
                opened[file] = _read(checkpoint.path / file)
            for key, target in optimizer.state(name).items():
                target.copy_(opened[file][name][key])
    optimizer.restore_finished(checkpoint.manifest["optimizer_steps"])


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _candidates(directory: Path) -> tuple[list[int], int | None, str | None]:
    """Steps with a folder; the one that ``latest`` names; what is wrong with ``latest``, if there is anything to name."""
    steps = saved_steps(directory)
    try:
        name = (directory / LATEST).read_text().strip()
    except FileNotFoundError:
        return steps, None, "is missing" if steps else None
    except (OSError, ValueError) as error:
        return steps, None, f"cannot be read ({error})"
    match = _NAME.fullmatch(name)
    if match is None:
        return steps, None, f"names no checkpoint ({name[:40]!r})"
    step = int(match[1])
    return (steps, step, None) if step in steps else (steps, None, f"names {name}, which is not there")


def _verify(path: Path, step: int) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a checkpoint folder, the same answer on every rank; and its manifest."""
    problem, manifest = read_manifest(path, step)
    if problem is None:
        share = manifest["files"][dist.get_rank() :: dist.get_world_size()]
        problem = next((line for entry in share if (line := _file_problem(path, entry)) is not None), None)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next((line for line in found if line is not None), None), manifest


def _file_problem(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file that a valid manifest lists: its bytes first, and only then what they hold."""
    name, file = entry["file"], path / entry["file"]
    try:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
            return f"{name} is damaged"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    try:
        held = _read(file)
        described = {
            name: {key: (list(tensor.shape), str(tensor.dtype)) for key, tensor in state.items()}
            for name, state in held.items()
        }
    except Exception as error:  # whatever torch makes of a file that is not one of ours
        return f"{name} holds no tensors ({type(error).__name__})"
    wanted = {
        name: dict.fromkeys(STATES, (shape, f"torch.{entry['dtype']}")) for name, shape in entry["parameters"].items()
    }
    return None if described == wanted else f"{name} holds other tensors than {MANIFEST} says"


def _same_everywhere(found: tuple[list[int], int | None, str | None]) -> tuple[list[int], int | None, str | None]:
    """What rank 0 found."""
    shared: list[Any] = [found]
    dist.broadcast_object_list(shared, src=0)
    steps, named, problem = shared[0]
    return steps, named, problem


def _mismatch(
    checkpoint: Checkpoint,
    config: Config,
    num_samples: int,
    optimizer: CheckpointedOptimizer,
    index: dict[str, dict[str, Any]],
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
    if checkpoint.manifest["num_samples"] != num_samples:
        differences.append(f"training samples: {checkpoint.manifest['num_samples']:,} there, {num_samples:,} here")
    if differences:
        return f"{checkpoint.path} is of another run ({', '.join(differences)}); {advice}"
    for name, parameter in optimizer.parameters.items():
        if name not in index or index[name]["shape"] != list(parameter.shape):
            return f"{checkpoint.path} has no {name} of shape {list(parameter.shape)}; {advice}"
    return None


def _canonical(config: Config) -> dict[str, Any]:
    return {**config.model.model_dump(mode="json"), "num_key_value_heads": config.model.key_value_heads}


def _order_settings(config: Config) -> dict[str, Any]:
    """What decides which samples come when, beside their number, and which tokens the losses are of; another path may hold
    the same data."""
    weights = None if config.data.blend is None else [entry.weight for entry in config.data.blend]
    data = config.data
    return {
        "sequence_length": data.sequence_length,
        "seed": data.seed,
        "blend": weights,
        "answer_token": data.answer_token,
    }
