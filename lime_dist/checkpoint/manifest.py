"""The manifest of a checkpoint: what it must hold to be believed, and its checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lime_dist.data.files import json_bytes

MANIFEST, LATEST = "manifest.json", "latest"
FORMAT = "lime_dist checkpoint 1"
STATES = ("weight", "exp_avg", "exp_avg_sq")
"""What is kept of a parameter: the names are AdamW's."""


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


class _Layout(_Strict):
    pipeline_stages: int = Field(ge=1)
    replicas: int = Field(ge=1)
    zero_stage: int


class _Manifest(_Strict):
    """``checksum`` is of the manifest's other values: a flipped bit in a number of samples would be believed without it."""

    format: Literal["lime_dist checkpoint 1"]
    version: str
    state: _State
    optimizer_steps: int = Field(ge=0)
    num_samples: int = Field(ge=1)
    config: dict[str, Any]
    layout: _Layout
    files: list[_File] = Field(min_length=1)
    checksum: str


def read_manifest(path: Path, step: int | None = None) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with the manifest in a checkpoint folder, or None and the manifest; it must be of ``step``, if given."""
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
        return f"{MANIFEST} has a file or a parameter twice", {}
    return None, manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of all of a manifest but its ``checksum``."""
    return hashlib.sha256(json_bytes({**manifest, "checksum": None})).hexdigest()
