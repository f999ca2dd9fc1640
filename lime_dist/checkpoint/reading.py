"""Reading the weights of a checkpoint in one process, without a process group and without DeepSpeed.

The trainer passes over a damaged checkpoint. Here the caller has asked for this one, so a damaged one is an error.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from lime_dist.checkpoint.manifest import BEST, LATEST, MANIFEST, read_best, read_latest, read_manifest
from lime_dist.checkpoint.store import saved_steps
from lime_dist.config.schema import Config, ModelConfig
from lime_dist.data.files import sha256_file
from lime_dist.data.state import TrainState
from lime_dist.errors import LimeError
from lime_dist.model.decoder import Decoder, build_decoder, decoder_layers
from lime_dist.model.optimizer_states import WEIGHT

Weights = dict[str, Tensor]
"""Float32 weights by exported name, in the order of the model's flat list."""


@dataclass(frozen=True)
class Source:
    """Where weights were read from: the folder of a checkpoint, and the SHA-256 of its manifest."""

    path: Path
    manifest_sha256: str


def find_checkpoint(path: Path) -> Path:
    """The folder ``global_stepN`` of the checkpoint that ``path`` stands for.

    Args:
        path: such a folder; the file ``best`` beside it, for the one with the lowest validation loss; or a run folder or its
            ``checkpoints``, for the checkpoint that ``latest`` names. Without ``latest``, it is the one with most steps; so it is
            if ``latest`` is damaged, which is said on stderr.

    Raises:
        LimeError: there is no checkpoint.
    """
    if (path / MANIFEST).is_file():
        return path
    if path.name == BEST and path.is_file():
        best = read_best(path.parent)
        if best is None:
            raise LimeError(f"{path}: names no checkpoint that is there; a run with train.keep_best=true writes it")
        return path.parent / f"global_step{best[0]}"
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    name, problem = read_latest(folder)
    if name is not None:
        return folder / name
    steps = saved_steps(folder)
    if not steps:
        raise LimeError(
            f"{path}: no checkpoint there; give a run folder, its checkpoints folder, or one global_stepN in it"
        )
    newest = folder / f"global_step{steps[-1]}"
    if problem is not None:
        print(f"warning: {folder / LATEST} {problem}; reading {newest}", file=sys.stderr)
    return newest


def read_weights(path: str | Path) -> tuple[Config, TrainState, Weights]:
    """Configuration, state and weights of a checkpoint; `find_checkpoint` says what ``path`` may be.

    Raises:
        LimeError: there is no checkpoint, it is damaged, or this version does not know its configuration.
    """
    folder = find_checkpoint(Path(path))
    advice = "give another checkpoint, global_stepN, of the run"
    problem, manifest = read_manifest(folder)
    if problem is not None:
        raise LimeError(f"{folder}: {problem}; {advice}")
    try:
        config = Config.model_validate(manifest["config"])
    except ValidationError:
        raise LimeError(f"{folder} was written with settings that this version does not know; {advice}") from None
    state = TrainState(**manifest["state"])
    for entry in manifest["files"]:
        file = folder / entry["file"]
        if not file.is_file():
            raise LimeError(f"{file} is missing, though {MANIFEST} lists it; {advice}")
        if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
            raise LimeError(f"{file} is damaged: its size or SHA-256 differs from {MANIFEST}; {advice}")
    shapes = parameter_shapes(config.model)
    weights: Weights = {}
    for entry in manifest["files"]:
        values = torch.load(folder / entry["file"], map_location="cpu", weights_only=True, mmap=True)
        weights.update({parameter: states[WEIGHT].float() for parameter, states in values.items()})
    for parameter, shape in shapes.items():
        if parameter not in weights or weights[parameter].shape != shape:
            raise LimeError(f"{folder} has no {parameter} of shape {list(shape)}; {advice}")
    return config, state, {parameter: weights[parameter] for parameter in shapes}


def source_of(path: str | Path) -> Source:
    """The source of weights that `read_weights` reads from ``path``."""
    folder = find_checkpoint(Path(path))
    return Source(folder.resolve(), sha256_file(folder / MANIFEST))


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Shape of every parameter by exported name, in the order of the model's flat list; a tied weight is listed once."""
    shapes: dict[str, torch.Size] = {}
    for spec in decoder_layers(config):
        with torch.device("meta"):
            module = spec.make()
        names = spec.exported_names(module)
        shapes.update({names[local]: parameter.shape for local, parameter in module.named_parameters()})
    return shapes


def load_decoder(config: ModelConfig, weights: Weights) -> Decoder:
    """The trainer's decoder in one process, in evaluation mode. It shares the memory of ``weights``."""
    decoder = build_decoder(config, device="meta")
    decoder.load_state_dict(weights, assign=True)
    return decoder.eval()
