"""The checkpoint of another run with which a new run starts: ``run.start_from``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lime_dist.checkpoint.folder import folder_name
from lime_dist.checkpoint.manifest import CHECKPOINT_NAME, read_manifest
from lime_dist.checkpoint.reading import find_checkpoint
from lime_dist.checkpoint.store import Checkpoint, saved_steps, verify, why_not_loadable
from lime_dist.config.schema import Config, RunConfig
from lime_dist.data.identity import DataIdentity
from lime_dist.distributed import agree, from_main_process
from lime_dist.errors import LimeError
from lime_dist.launchers import is_main_process

ADVICE = "run.start_from is a run folder, or RUN@STEP for the checkpoint of a step"


def find_source(run: RunConfig) -> Checkpoint | None:
    """The verified checkpoint that ``run.start_from`` names; None: it is not set. All ranks call it together.

    Raises:
        LimeError: there is none, or it is damaged.
    """
    if run.start_from is None:
        return None
    chosen: list[Any] = [None, None]
    if is_main_process():
        try:
            chosen[0] = _folder(run.start_from)
        except LimeError as error:
            chosen[1] = str(error)
    folder, problem = from_main_process(chosen)
    agree(problem)
    problem, manifest = verify(folder, _step(folder))
    agree(None if problem is None else f"{folder}: {problem}; {ADVICE}")
    return _source(folder, manifest, run)


def why_not_startable(config: Config, data: DataIdentity) -> str | None:
    """Why a new run with this configuration could not start from its source, or None; in one process, by the manifest alone."""
    if config.run.start_from is None:
        return None
    try:
        folder = _folder(config.run.start_from)
    except LimeError as error:
        return str(error)
    problem, manifest = read_manifest(folder, _step(folder))
    if problem is not None:
        return f"{folder}: {problem}; {ADVICE}"
    return why_not_loadable(_source(folder, manifest, config.run), config, data)


def _source(folder: Path, manifest: dict[str, Any], run: RunConfig) -> Checkpoint:
    return Checkpoint(folder, manifest, of_another_run=True, weights_only=run.start_weights_only)


def _folder(start_from: str) -> Path:
    """The folder ``global_stepN`` that RUN or RUN@STEP stands for.

    Raises:
        LimeError: it does not exist.
    """
    match = re.fullmatch(r"(.+)@(\d+)", start_from)
    if match is None or Path(start_from).exists():
        try:
            return find_checkpoint(Path(start_from))
        except LimeError as error:
            raise LimeError(f"run.start_from={start_from}: {error}") from None
    run, step = Path(match[1]), int(match[2])
    directory = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    folder = directory / folder_name(step)
    if not folder.is_dir():
        steps = ", ".join(map(str, saved_steps(directory))) or "none"
        raise LimeError(f"run.start_from={start_from}: no checkpoint of that step in {directory}; there are: {steps}")
    return folder


def _step(folder: Path) -> int | None:
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    return None if match is None else int(match[1])
