"""A run folder as it lies on disk, read without starting a process: records, configuration, router weights of its checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lime_dist.checkpoint.manifest import read_manifest
from lime_dist.config.schema import ModelConfig
from lime_dist.errors import LimeError

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """What a run has left.

    Attributes:
        settings: by dotted key, as in its ``config.yaml``.
        steps: records of training steps, ascending.
        validations: records with a ``validation_loss``.
    """

    path: Path
    settings: dict[str, Any]
    steps: list[Record]
    validations: list[Record]


def read_run(path: Path) -> RunFolder:
    """Read a run's records and configuration.

    Raises:
        LimeError: it is no run folder, or nothing has been recorded in it.
    """
    records = list(_records(path / "metrics.jsonl", path))
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "validation_loss" in record]
    if not steps and not validations:
        raise LimeError(f"{path / 'metrics.jsonl'} has no step yet; report on the run when it has made some")
    return RunFolder(path, _settings(path / "config.yaml"), steps, validations)


def _records(file: Path, run: Path) -> Iterator[Record]:
    """The lines of metrics.jsonl; a last line that was cut off is left out."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise LimeError(f"{run} is no run folder: {file.name} cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record["step"], int):
                raise ValueError
        except (ValueError, KeyError):
            if number == len(lines):  # it has no end of line: a crash, or a run that goes on
                return
            raise LimeError(f"{file}, line {number} is no record of a step; mend or remove it") from None
        yield record


def _settings(file: Path) -> dict[str, Any]:
    """By dotted key; of any version, so that it is not checked against this one's schema."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LimeError(f"{file} cannot be read ({error.strerror}); it belongs to every run") from None
    except (yaml.YAMLError, ValueError):
        raise LimeError(f"{file} is not valid YAML; mend it, or take it from the run's newest checkpoint") from None
    return flattened(values) if isinstance(values, dict) else {}


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def read_router_weights(path: Path) -> tuple[int, ModelConfig, dict[str, Any]]:
    """Step, model and weights of the routers in the newest checkpoint of a run; {}: that model has no map.

    Only what is asked for is read, so that the size of the model does not matter.

    Raises:
        LimeError: there is no checkpoint, or it cannot be read.
    """
    folders = [(int(found[1]), folder) for folder in (path / "checkpoints").glob("global_step*")
               if (found := re.fullmatch(r"global_step(\d+)", folder.name))]  # fmt: skip
    if not folders:
        raise LimeError(f"{path} has no checkpoint")
    step, folder = max(folders)
    problem, manifest = read_manifest(folder, step)
    if problem is not None:
        raise LimeError(f"{folder}: {problem}")
    try:
        config = ModelConfig.model_validate(manifest["config"]["model"])
    except (ValidationError, KeyError):
        raise LimeError(f"{folder} was written with settings that this version does not know") from None
    files = {entry["file"]: (entry["bytes"], set(entry["parameters"])) for entry in manifest["files"]}

    import torch  # takes seconds

    from lime_dist.monitor.routers import has_map, weight_names

    weights: dict[str, Any] = {}
    wanted = set(weight_names(config)) if has_map(config) else set()
    for name, (size, parameters) in files.items():
        if not parameters & wanted:
            continue
        file = folder / name
        try:
            if file.stat().st_size != size:
                raise LimeError(f"{file} is damaged")
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            weights |= {parameter: held[parameter]["weight"].clone() for parameter in parameters & wanted}
        except OSError as error:
            raise LimeError(f"{file} cannot be read ({error.strerror})") from None
        except LimeError:
            raise
        except Exception as error:  # whatever torch makes of a file that is not one of ours
            raise LimeError(f"{file} is damaged ({type(error).__name__})") from None
    return step, config, weights
