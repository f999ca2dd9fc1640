"""The only place where a DeepSpeed configuration is made.

DeepSpeed launches the processes, lays out the pipeline and runs its schedule. It is told nothing of precision, ZeRO or
clipping: those belong to ``train/optim.py``, because DeepSpeed's own gradient norm is wrong under pipelines in float32
and its ZeRO-1 hangs there when stages have different parameter groups (measured with 0.19.8).
"""

from __future__ import annotations

from typing import Any

from lime_dist.config.schema import Config
from lime_dist.errors import LimeError


def batch_split(config: Config, world_size: int) -> tuple[int, int]:
    """How the global batch is divided: (data-parallel width, micro-batches a step and replica, after a ramp).

    Raises:
        LimeError: the processes do not divide into stages, or the batch does not factor.
    """
    stages = config.parallel.pipeline_stages
    if world_size % stages:
        raise LimeError(
            f"parallel.pipeline_stages={stages} does not divide the {world_size} processes that were launched; "
            f"launch a multiple of {stages} processes or change parallel.pipeline_stages"
        )
    width = world_size // stages
    train = config.train
    batch_sizes = {"train.global_batch_size": train.global_batch_size}
    if train.batch_ramp is not None:
        batch_sizes["train.batch_ramp.start"] = train.batch_ramp.start
        batch_sizes["train.batch_ramp.increment"] = train.batch_ramp.increment
    wide = train.micro_batch_size * width
    for key, samples in batch_sizes.items():
        if samples % wide:
            raise LimeError(
                f"{key}={samples} is not micro-batch × accumulation × width: train.micro_batch_size="
                f"{train.micro_batch_size} × {width} data-parallel replicas = {wide} must divide it"
            )
    return width, train.global_batch_size // (train.micro_batch_size * width)


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The dictionary that DeepSpeed's engine is built from."""
    _, micro_batches = batch_split(config, world_size)
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": None,
    }
