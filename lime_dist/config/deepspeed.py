"""Make the DeepSpeed configuration.

DeepSpeed launches the processes, lays out the pipeline and runs its schedule. Precision, ZeRO and clipping are not handed to
it: with pipelines, DeepSpeed computes a wrong gradient norm in float32, and its ZeRO-1 hangs if stages have different parameter
groups (measured with 0.19.8). The optimizers of this package do that work.
"""

from __future__ import annotations

from typing import Any

from lime_dist.config.schema import Config, TrainConfig
from lime_dist.errors import LimeError


def batch_sizes(train: TrainConfig) -> dict[str, int]:
    """By key, the samples that micro-batches of all replicas must divide, so that they divide every global batch of the run."""
    ramp = train.batch_ramp
    sizes = {"train.global_batch_size": train.global_batch_size}
    if ramp is not None:
        sizes |= {"train.batch_ramp.start": ramp.start, "train.batch_ramp.increment": ramp.increment}
    return sizes


def batch_split(config: Config, world_size: int) -> tuple[int, int]:
    """Divide the global batch: (data-parallel width, micro-batches per step and replica, once a batch ramp has ended).

    Raises:
        LimeError: the stages do not divide the processes, or the micro-batches of all replicas do not divide the batch.
    """
    stages = config.parallel.pipeline_stages
    if world_size % stages:
        raise LimeError(
            f"parallel.pipeline_stages={stages} does not divide the {world_size} processes that were launched; "
            f"launch a multiple of {stages} processes or change parallel.pipeline_stages"
        )
    width = world_size // stages
    train = config.train
    unit = train.micro_batch_size * width
    for key, samples in batch_sizes(train).items():
        if samples % unit:
            raise LimeError(
                f"{key}={samples} is not micro-batch × accumulation × width: train.micro_batch_size="
                f"{train.micro_batch_size} × {width} data-parallel replicas = {unit} must divide it"
            )
    return width, train.global_batch_size // unit


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Return the dictionary that DeepSpeed's engine is built from."""
    _, micro_batches = batch_split(config, world_size)
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": None,
    }
