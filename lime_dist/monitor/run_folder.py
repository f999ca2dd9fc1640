"""Reads a run folder without a process group: records, configuration, and router weights of its newest checkpoint."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lime_dist.checkpoint.manifest import read_manifest
from lime_dist.config.flat import flattened
from lime_dist.config.schema import ModelConfig
from lime_dist.data.files import read_json_lines
from lime_dist.errors import LimeError
from lime_dist.model.architecture import architecture_of
from lime_dist.monitor.metrics import is_record

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """The records and the configuration of a run.

    Attributes:
        settings: the values of its ``config.yaml`` by dotted key.
        steps: records of training steps, ascending.
        validations: records with a ``validation_loss``.
        samples: records with ``sample_texts``.
    """

    path: Path
    settings: dict[str, Any]
    steps: list[Record]
    validations: list[Record]
    samples: list[Record] = field(default_factory=list)


def read_run(path: Path) -> RunFolder:
    """Read a run's records and configuration.

    Raises:
        LimeError: ``path`` is not a run folder, or it has no record yet.
    """
    records = _records(path / "metrics.jsonl", path)
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "validation_loss" in record]
    if not steps and not validations:
        raise LimeError(f"{path / 'metrics.jsonl'} has no step yet; try again when the run has made some")
    samples = [record for record in records if isinstance(record.get("sample_texts"), dict)]
    return RunFolder(path, _settings(path / "config.yaml"), steps, validations, samples)


def _records(file: Path, run: Path) -> list[Record]:
    """The records of metrics.jsonl without the lines that a crash left unreadable; a warning says how many these are."""
    try:
        ended = file.read_bytes()[-1:] in (b"", b"\n")
        lines, damaged = read_json_lines(file)
    except OSError as error:
        raise LimeError(f"{run} is not a run folder: {file.name} cannot be read ({error.strerror})") from None
    records = [record for _, record in lines if is_record(record)]
    damaged += len(lines) - len(records)
    if damaged > (not ended):  # without a newline the run may be writing the last line
        print(f"warning: {file}: {damaged} unreadable line(s) left out", file=sys.stderr)
    return records


def _settings(file: Path) -> dict[str, Any]:
    """The configuration by dotted key. It may be of any version, so it is not validated."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LimeError(f"{file} cannot be read ({error.strerror}); every run folder has one") from None
    except (yaml.YAMLError, ValueError):
        raise LimeError(
            f"{file} is not valid YAML; repair it, or copy it from the manifest of the newest checkpoint"
        ) from None
    return flattened(values) if isinstance(values, dict) else {}


def read_router_weights(path: Path) -> tuple[int, ModelConfig, dict[str, Any]]:
    """Step, model, and router weights of a run's newest checkpoint; {} if the model has no router map.

    Only these weights are read, whatever the size of the model.

    Raises:
        LimeError: the run has no checkpoint, or it cannot be read.
    """
    folders = [(int(match[1]), folder) for folder in (path / "checkpoints").glob("global_step*")
               if (match := re.fullmatch(r"global_step(\d+)", folder.name))]  # fmt: skip
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

    weights: dict[str, Any] = {}
    architecture = architecture_of(config)
    wanted = set() if architecture.router_map_obstacle else set(architecture.router_parameters)
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
