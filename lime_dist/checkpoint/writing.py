"""Writing a checkpoint of weights alone from one process, without a process group: for imported and compressed models.

Optimizer states are zero and no updates are counted, so a run starts its schedule from these weights.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lime_dist.checkpoint.folder import file_name, folder_name, partial_folder, publish, write_tensors
from lime_dist.checkpoint.manifest import make_manifest
from lime_dist.checkpoint.reading import Weights
from lime_dist.config.schema import Config
from lime_dist.data.files import free_name, remove
from lime_dist.data.identity import DataIdentity
from lime_dist.data.state import TrainState
from lime_dist.errors import LimeError
from lime_dist.model.optimizer_states import WEIGHT, optimizer_states


def write_checkpoint(
    directory: Path, config: Config, data: DataIdentity, weights: Weights, consumed_samples: int = 0
) -> Path:
    """Write the checkpoint of step 0 into ``directory`` and return its folder. After an error the folder is absent.

    Args:
        data: the training data.
        consumed_samples: position in the order of samples at which the run starts.

    Raises:
        LimeError: ``directory`` holds a checkpoint already, or cannot be written.
    """
    if any(directory.glob("global_step*")):
        raise LimeError(f"{directory}: holds checkpoints already; give another run.directory, or delete them")
    final = directory / folder_name(0)
    remove(partial_folder(directory, 0))
    partial = free_name(partial_folder(directory, 0))
    values = {}
    for name, states in optimizer_states(config, weights).items():
        weight = weights[name].to(torch.float32)
        zeros = {state: torch.zeros_like(weight, memory_format=torch.contiguous_format) for state in states}
        values[name] = {WEIGHT: weight.contiguous().clone(), **zeros}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        entry = write_tensors(partial, file_name(0, 0), values)
        manifest = make_manifest(
            config,
            TrainState(0, consumed_samples),
            optimizer_steps=0,
            data=data,
            layout={"pipeline_stages": 1, "replicas": 1, "zero_stage": 0},
            files=[entry],
        )
        publish(partial, final, manifest)
    except OSError as error:
        remove(partial)
        raise LimeError(f"{directory}: cannot be written ({error.strerror or error}); nothing was kept") from None
    return final
