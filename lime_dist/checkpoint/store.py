"""Checkpoints that do not depend on the layout of processes: finding, verifying and loading them.

    checkpoints/latest                           name of the folder that the run resumes from
    checkpoints/global_step100/manifest.json     step, consumed samples, configuration, layout; per file size, SHA-256, parameters
    checkpoints/global_step100/stage000-replica000.pt   one owner's {name: {weight, optimizer states…}}; with AdamW
                                                        {name: {weight, exp_avg, exp_avg_sq}}

A run resumes from the checkpoint that ``latest`` names if that one is whole, else from the newest whole one; a line tells of
each that is passed over. Writing another name into ``latest`` makes the run go back to that checkpoint. A checkpoint is whole
if its manifest is valid and every file has the listed size and hash and holds the listed tensors. Files are read as tensors
only; nothing is unpickled. `saver.py` writes checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from lime_dist.checkpoint.data_changes import DataComparison, compare_data
from lime_dist.checkpoint.folder import folder_name
from lime_dist.checkpoint.manifest import CHECKPOINT_NAME, LATEST, MANIFEST, read_latest, read_manifest, saved_states
from lime_dist.checkpoint.optimizer import CheckpointedOptimizer
from lime_dist.config.flat import flattened, shown
from lime_dist.config.schema import Config
from lime_dist.data.files import sha256_file
from lime_dist.data.identity import DataIdentity
from lime_dist.data.state import TrainState
from lime_dist.distributed import agree, from_main_process
from lime_dist.model.optimizer_states import WEIGHT


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        of_another_run: whether a new run starts from it (``run.start_from``), instead of the run that wrote it.
        weights_only: whether that run takes nothing but its weights, and begins at step 0.
    """

    path: Path
    manifest: dict[str, Any]
    of_another_run: bool = False
    weights_only: bool = False

    @property
    def state(self) -> TrainState:
        """Where a run goes on that loads it."""
        return TrainState() if self.weights_only else TrainState(**self.manifest["state"])

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer of such a run has seen."""
        return 0 if self.weights_only else int(self.manifest["optimizer_steps"])

    @property
    def key(self) -> str:
        """The configuration key that led to it."""
        return "run.start_from" if self.of_another_run else "run.directory"

    @property
    def advice(self) -> str:
        """What to do if it does not fit."""
        return f"give another {self.key}, or the settings that its run was started with"


def saved_steps(directory: Path) -> list[int]:
    """The steps whose folders exist, whole or not, in ascending order."""
    return sorted(
        int(match[1])
        for path in directory.glob("global_step*")
        if (match := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    )


def find_newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, and lines about those that were passed over. All ranks call it together.

    Every rank reads the manifest; the ranks divide the files among themselves to verify them.
    """
    lines: list[str] = []
    steps, named, problem = from_main_process(_candidates(directory))
    if problem is not None:
        lines.append(f"{directory / LATEST} {problem}; looking for the newest whole checkpoint")
    for step in _in_order(steps, named):
        path = directory / folder_name(step)
        problem, manifest = verify(path, step)
        if problem is None:
            if step == named and step < steps[-1]:
                lines.append(
                    f"{directory / LATEST} names {path.name}; the newer {folder_name(steps[-1])} is left aside"
                )
            return Checkpoint(path, manifest), lines
        lines.append(f"{path}: {problem}; passed over")
    return None, lines


def load(
    checkpoint: Checkpoint, config: Config, data: DataIdentity, optimizer: CheckpointedOptimizer
) -> tuple[str, ...]:
    """Load this rank's part of a checkpoint into the optimizer and the weights. All ranks call it together.

    Args:
        data: the training data.

    Returns:
        Lines about what a change of the data means.

    Raises:
        LimeError: the checkpoint is of another model, or, unless its weights alone are taken, of another optimizer or dataset.
            Nothing has been loaded then.
    """
    index: dict[str, dict[str, Any]] = {}
    for entry in checkpoint.manifest["files"]:
        for name, shape in entry["parameters"].items():
            index[name] = {"file": entry["file"], "shape": shape}
    problem, compared = _mismatch(checkpoint, config, optimizer, index), DataComparison()
    if problem is None and not checkpoint.weights_only:
        compared = compare_data(checkpoint.path, checkpoint.manifest, config, data, checkpoint.key)
    agree(problem or compared.problem)
    opened: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    with torch.no_grad():
        for name in optimizer.local_names():
            file = index[name]["file"]
            if file not in opened:
                opened[file] = _read(checkpoint.path / file)
            for part in optimizer.state(name):
                for key, target in part.values.items():
                    if checkpoint.weights_only and key != WEIGHT:
                        target.zero_()
                    else:
                        target.copy_(opened[file][name][key].view(-1)[part.elements.start : part.elements.stop])
    optimizer.restore_finished(checkpoint.optimizer_steps)
    return compared.notes


def why_not_resumable(directory: Path, config: Config, data: DataIdentity) -> str | None:
    """Why a run with this configuration could not resume from the newest checkpoint, or None; in one process.

    It compares what `load` compares, by the manifests alone: no file of weights is read.

    Args:
        directory: the run's folder of checkpoints.
        data: the training data.
    """
    steps, named, _ = _candidates(directory)
    for step in _in_order(steps, named):
        path = directory / folder_name(step)
        problem, manifest = read_manifest(path, step)
        if problem is None:
            return why_not_loadable(Checkpoint(path, manifest), config, data)
    return no_whole_checkpoint(directory) if steps else None


def why_not_loadable(checkpoint: Checkpoint, config: Config, data: DataIdentity) -> str | None:
    """Why a run with this configuration could not start from a checkpoint, or None, by its manifest alone."""
    if (problem := _settings_mismatch(checkpoint, config)) is not None or checkpoint.weights_only:
        return problem
    return compare_data(checkpoint.path, checkpoint.manifest, config, data, checkpoint.key).problem


def no_whole_checkpoint(directory: Path) -> str:
    """The line about a folder of checkpoints of which none is whole."""
    return f"no whole checkpoint in {directory}; remove the folder or give another run.directory"


def _in_order(steps: list[int], named: int | None) -> list[int]:
    """The steps in the order in which their checkpoints are tried."""
    return ([] if named is None else [named]) + [step for step in reversed(steps) if step != named]


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _candidates(directory: Path) -> tuple[list[int], int | None, str | None]:
    """Steps that have a folder; the step that ``latest`` names; what is wrong with ``latest``, unless there are no folders."""
    steps = saved_steps(directory)
    name, problem = read_latest(directory)
    if name is None:
        return steps, None, "is missing" if problem is None and steps else problem
    step = int(name.removeprefix("global_step"))
    return (steps, step, None) if step in steps else (steps, None, f"names {name}, which does not exist")


def verify(path: Path, step: int | None) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a checkpoint folder, the same answer on every rank; and its manifest. All ranks call it together.

    Args:
        step: that its name gives; None: none.
    """
    problem, manifest = read_manifest(path, step)
    if problem is None:
        states = saved_states(manifest)
        share = manifest["files"][dist.get_rank() :: dist.get_world_size()]
        problem = next((line for entry in share if (line := _file_problem(path, entry, states)) is not None), None)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((line for line in problems if line is not None), None), manifest


def _file_problem(path: Path, entry: dict[str, Any], states: dict[str, tuple[str, ...]] | None) -> str | None:
    """What is wrong with a file that a valid manifest lists. Its bytes are checked before its content is read.

    Args:
        states: optimizer states of each parameter; None if they are not known, which is reported when it is loaded.
    """
    name, file = entry["file"], path / entry["file"]
    try:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
            return f"{name} is damaged"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    try:
        held = {
            parameter: {key: (list(tensor.shape), str(tensor.dtype)) for key, tensor in tensors.items()}
            for parameter, tensors in _read(file).items()
        }
    except Exception as error:  # torch raises many kinds of errors for a file that it has not written
        return f"{name} holds no tensors ({type(error).__name__})"
    listed = {}
    for parameter, shape in entry["parameters"].items():
        keys = (WEIGHT, *states[parameter]) if states is not None else held.get(parameter, ())
        listed[parameter] = dict.fromkeys(keys, (shape, f"torch.{entry['dtype']}"))
    return None if held == listed else f"{name} holds other tensors than {MANIFEST} says"


def _mismatch(
    checkpoint: Checkpoint,
    config: Config,
    optimizer: CheckpointedOptimizer,
    index: dict[str, dict[str, Any]],
) -> str | None:
    """Why this checkpoint cannot continue this run, or None."""
    if (problem := _settings_mismatch(checkpoint, config)) is not None:
        return problem
    for name, parameter in optimizer.parameters.items():
        if name not in index or index[name]["shape"] != list(parameter.shape):
            return f"{checkpoint.path} has no {name} of shape {list(parameter.shape)}; {checkpoint.advice}"
    return None


def _settings_mismatch(checkpoint: Checkpoint, config: Config) -> str | None:
    """Which settings of a checkpoint forbid this run to continue from it, or None."""
    try:
        saved = Config.model_validate(checkpoint.manifest["config"])
    except ValidationError:
        return f"{checkpoint.path} was written with settings that this version does not know; {checkpoint.advice}"
    compared = [("model", _model_settings(saved), _model_settings(config))]
    if not checkpoint.weights_only:
        compared += [
            ("data", _order_settings(saved), _order_settings(config)),
            ("optimizer", {"name": saved.optimizer.name}, {"name": config.optimizer.name}),
        ]
    differences = [
        f"{section}.{key}: {shown(there[key])} there, {shown(here[key])} here"
        for section, there, here in compared
        for key in here
        if there[key] != here[key]
    ]
    if differences:
        return f"{checkpoint.path} is of another run ({', '.join(differences)}); {checkpoint.advice}"
    return None


def _model_settings(config: Config) -> dict[str, Any]:
    """The model's settings in one form: the number of key/value heads is given even if the configuration leaves it out."""
    return {**flattened(config.model.model_dump(mode="json")), "num_key_value_heads": config.model.key_value_heads}


def _order_settings(config: Config) -> dict[str, Any]:
    """What decides, beside the data and their weights, which samples come when and which tokens losses count."""
    return config.data.model_dump(include={"sequence_length", "seed", "answer_token"})
