"""A checkpoint made of weights alone, by one process, without a process group: for models that no run of ours has trained.

Moments are zero, and so is the number of updates, so that a run starts its schedule from these weights.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

import lime_dist
from lime_dist.checkpoint.manifest import FORMAT, LATEST, MANIFEST, manifest_checksum
from lime_dist.checkpoint.reading import Weights
from lime_dist.config.schema import Config
from lime_dist.data.files import json_bytes, sha256_file, sync_folder, write_atomic
from lime_dist.data.state import TrainState
from lime_dist.errors import LimeError

FILE = "stage000-replica000.pt"


def write_checkpoint(
    directory: Path, config: Config, num_samples: int, weights: Weights, consumed_samples: int = 0
) -> Path:
    """Write ``directory/global_step0``, which is whole or absent; returns it.

    Args:
        num_samples: of the training split.
        consumed_samples: where in the order of samples the run begins.

    Raises:
        LimeError: there are checkpoints already, or the disk refuses.
    """
    if any(directory.glob("global_step*")):
        raise LimeError(f"{directory}: holds checkpoints already; give another run.directory, or delete them")
    partial, final = directory / ".global_step0.partial", directory / "global_step0"
    values = {}
    for name, weight in weights.items():
        exact = weight.to(torch.float32)
        zeros = torch.zeros_like(exact, memory_format=torch.contiguous_format)
        values[name] = {"weight": exact.contiguous().clone(), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with (partial / FILE).open("wb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())
        manifest = {
            "format": FORMAT,
            "version": lime_dist.__version__,
            "state": TrainState(0, consumed_samples).as_dict(),
            "optimizer_steps": 0,
            "num_samples": num_samples,
            "config": config.model_dump(mode="json"),
            "layout": {"pipeline_stages": 1, "replicas": 1, "zero_stage": 0},
            "files": [
                {
                    "file": FILE,
                    "bytes": (partial / FILE).stat().st_size,
                    "sha256": sha256_file(partial / FILE),
                    "dtype": "float32",
                    "parameters": {name: list(weight.shape) for name, weight in weights.items()},
                }
            ],
        }
        write_atomic(partial / MANIFEST, json_bytes({**manifest, "checksum": manifest_checksum(manifest)}))
        partial.rename(final)
        sync_folder(directory)
        write_atomic(directory / LATEST, f"{final.name}\n".encode())
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise LimeError(f"{directory}: cannot be written ({error.strerror or error}); nothing was kept") from None
    return final
