"""The folder of one checkpoint: its files are written and hashed, then it gets its name, and ``latest`` points at it.

    .global_step100.partial/    files are written here and flushed to disk
    global_step100/             once all files and the manifest are there, the folder is renamed
    latest                      is replaced last, atomically

So a process that is killed at any moment leaves a checkpoint whole or absent.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from lime_dist.checkpoint.manifest import LATEST, MANIFEST
from lime_dist.data.files import free_name, json_bytes, remove, sync_folder, write_atomic
from lime_dist.model.optimizer_states import WEIGHT

Values = dict[str, dict[str, Tensor]]
"""By exported parameter name: the master weight and the optimizer states."""


def folder_name(step: int) -> str:
    """Name of the folder of a checkpoint."""
    return f"global_step{step}"


def partial_folder(directory: Path, step: int) -> Path:
    """The folder in which the checkpoint of a step is written."""
    return directory / f".{folder_name(step)}.partial"


def file_name(stage: int, replica: int) -> str:
    """Name of the file that one owner of parameters writes."""
    return f"stage{stage:03d}-replica{replica:03d}.pt"


def write_tensors(folder: Path, name: str, values: Values) -> dict[str, Any]:
    """Write and flush one file of a checkpoint.

    Returns:
        Its entry in the manifest.

    Raises:
        OSError: it cannot be written.
    """
    with (folder / name).open("wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save(values, cast(IO[bytes], hashed))  # torch.save needs write and flush only
        except (OSError, RuntimeError):  # torch raises a RuntimeError when a write fails
            if hashed.error is not None:
                raise hashed.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    first = next(iter(values.values()))[WEIGHT]
    return {
        "file": name,
        "bytes": hashed.size,
        "sha256": hashed.digest.hexdigest(),
        "dtype": str(first.dtype).removeprefix("torch."),
        "parameters": {parameter: list(states[WEIGHT].shape) for parameter, states in values.items()},
    }


def publish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, name the checkpoint ``final`` and point ``latest`` at it; the checkpoint is absent if that fails.

    Raises:
        OSError: something cannot be written.
    """
    write_atomic(partial / MANIFEST, json_bytes(manifest))
    delete(final)  # a damaged checkpoint of this step, or one that the run went back behind
    partial.rename(final)
    try:
        sync_folder(final.parent)
        write_atomic(final.parent / LATEST, f"{final.name}\n".encode())
    except OSError:
        delete(final)
        raise


def delete(path: Path) -> str | None:
    """Delete a checkpoint, if it exists. It is renamed first, so that a kill leaves nothing under its name.

    Returns:
        Why a part of it is left under a hidden name; None: nothing is.

    Raises:
        OSError: it cannot be renamed, and is as before.
    """
    if path.is_symlink():  # to another disk, for example: what it points at is not ours to delete
        path.unlink()
    elif path.exists():
        hidden = free_name(path.with_name(f".{path.name}.deleted"))
        path.rename(hidden)
        return remove(hidden)
    return None


class _HashedFile:
    """The file that torch.save writes to. It hashes what is written, so that nothing is read again, and keeps a write's error."""

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
