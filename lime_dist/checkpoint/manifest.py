"""The manifest of a checkpoint: how it is made, what it must hold to be valid, and its checksum."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import lime_dist
from lime_dist.config.schema import Config
from lime_dist.data.files import json_bytes
from lime_dist.data.identity import DataIdentity
from lime_dist.data.state import TrainState
from lime_dist.model.optimizer_states import States, optimizer_states

MANIFEST, LATEST, BEST = "manifest.json", "latest", "best"
FORMAT = "lime_dist checkpoint 1"
CHECKPOINT_NAME = re.compile(r"global_step(0|[1-9][0-9]{0,17})")
"""Name of the folder of a checkpoint; the group is its step."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _State(_Strict):
    step: int = Field(ge=0)
    consumed_samples: int = Field(ge=0)


class _File(_Strict):
    file: str = Field(pattern=r"^stage\d+-replica\d+\.pt$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    dtype: Literal["float32", "float64"]
    parameters: dict[str, list[Annotated[int, Field(ge=0)]]]


class _Dataset(_Strict):
    path: str
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Layout(_Strict):
    pipeline_stages: int = Field(ge=1)
    replicas: int = Field(ge=1)
    zero_stage: int


class _Manifest(_Strict):
    """``checksum`` covers all other values: without it a flipped bit in the number of samples would go unnoticed."""

    format: Literal["lime_dist checkpoint 1"]
    version: str
    state: _State
    optimizer_steps: int = Field(ge=0)
    num_samples: int = Field(ge=1)
    data: list[_Dataset] | None = None  # earlier versions did not record it
    config: dict[str, Any]
    layout: _Layout
    files: list[_File] = Field(min_length=1)
    checksum: str


def read_latest(directory: Path) -> tuple[str | None, str | None]:
    """The name of the checkpoint folder that ``latest`` gives.

    Returns:
        The name, None without a readable ``latest``; and what is wrong with the file, None: nothing, or there is none.
    """
    try:
        name = (directory / LATEST).read_bytes().decode().strip()
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return None, "cannot be read (it is not text)"
    if CHECKPOINT_NAME.fullmatch(name) is None:
        return None, f"names no checkpoint ({name[:40]!r})"
    return name, None


def read_best(directory: Path) -> tuple[int, float] | None:
    """Step and validation loss of the best checkpoint, as ``best`` says; None: there is none that is still there."""
    try:
        step, loss = (directory / BEST).read_text(encoding="utf-8").split()[:2]
        best = int(step.removeprefix("global_step")), float(loss)
    except (OSError, ValueError):
        return None
    return best if (directory / f"global_step{best[0]}").is_dir() else None


def make_manifest(
    config: Config,
    state: TrainState,
    *,
    optimizer_steps: int,
    data: DataIdentity,
    layout: dict[str, int],
    files: list[dict[str, Any]],
) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Args:
        config: configuration of the run that is saved.
        optimizer_steps: number of updates that the optimizer has applied.
        data: the training data that it has read.
        layout: ``pipeline_stages``, ``replicas`` and ``zero_stage`` of the processes that wrote it, for the reader's information.
        files: one entry per file, as `folder.write_tensors` returns it.
    """
    manifest = {
        "format": FORMAT,
        "version": lime_dist.__version__,
        "state": state.as_dict(),
        "optimizer_steps": optimizer_steps,
        "num_samples": data.num_samples,
        "data": data.as_list(),
        "config": config.model_dump(mode="json"),
        "layout": layout,
        "files": files,
    }
    return {**manifest, "checksum": manifest_checksum(manifest)}


def read_manifest(path: Path, step: int | None = None) -> tuple[str | None, dict[str, Any]]:
    """Read and check the manifest of a checkpoint folder.

    Args:
        step: the step that the manifest must be of; None accepts any.

    Returns:
        What is wrong with it, or None; and the manifest, empty if something is wrong.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        checked = _Manifest.model_validate(manifest)
        checksum = manifest_checksum(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{MANIFEST} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg'].lower()})", {}
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})", {}
    except (ValueError, RecursionError):
        return f"{MANIFEST} is damaged", {}
    files = [entry.file for entry in checked.files]
    names = [name for entry in checked.files for name in entry.parameters]
    if checked.checksum != checksum:
        return f"{MANIFEST} is damaged", {}
    if step is not None and checked.state.step != step:
        return f"{MANIFEST} is of step {checked.state.step}", {}
    if len(set(files)) < len(files) or len(set(names)) < len(names):
        return f"{MANIFEST} lists a file or a parameter twice", {}
    return None, manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of all values of a manifest except ``checksum``."""
    return hashlib.sha256(json_bytes({**manifest, "checksum": None})).hexdigest()


def saved_states(manifest: dict[str, Any]) -> States | None:
    """The optimizer states that a checkpoint holds of each parameter, as the optimizer in its configuration declares them.

    Returns:
        None if this version cannot tell, because it does not know the configuration.
    """
    names = [name for entry in manifest["files"] for name in entry["parameters"]]
    try:
        return optimizer_states(Config.model_validate(manifest["config"]), names)
    except ValueError:  # pydantic's ValidationError is one
        return None
