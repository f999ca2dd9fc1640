"""``parallel.activation_checkpointing: auto``: what each stage computes again, from the memory of its device. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

from lime_dist.config.deepspeed import batch_split
from lime_dist.config.schema import Checkpointing, Config
from lime_dist.pipeline.memory import MicroBatchBytes, stage_memory
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.schedules.base import make_schedule
from lime_dist.pipeline.shared_weights import parameters_by_stage

SETTINGS: tuple[Checkpointing, ...] = (False, "selective", True)
"""In the order in which they are tried: each needs less memory and more time than the one before."""
USABLE = 0.85
"""The share of a device's memory that live tensors may take; the allocator, libraries and buffers of transfers have the rest."""


def with_checkpointing(config: Config, memory: float | None, processes: int) -> Config:
    """The configuration with a setting for each stage in place of ``auto``, and with the cut for which it was chosen: that of a run
    that computes nothing again.

    Args:
        memory: bytes that each process has; None: unknown, and nothing is computed again.
        processes: of the job.

    Raises:
        LimeError: stages or micro-batches do not divide the job.
    """
    if config.parallel.activation_checkpointing != "auto" or memory is None:
        return config
    bounds = stage_bounds(config)
    peaks = [stage_peaks(config, bounds, setting, processes) for setting in SETTINGS]
    chosen = [
        next((setting for setting, peak in zip(SETTINGS, of_stage, strict=True) if peak <= USABLE * memory), True)
        for of_stage in zip(*peaks, strict=True)
    ]
    layers = [stop - start for start, stop in pairwise(bounds)]
    parallel = config.parallel.model_copy(update={"activation_checkpointing": chosen, "stage_layers": layers})
    return config.model_copy(update={"parallel": parallel})


def stage_peaks(config: Config, bounds: Sequence[int], setting: Checkpointing, processes: int) -> list[int]:
    """Bytes at the peak of every stage, if all of them have a setting."""
    replicas, micro_batches = batch_split(config, processes)
    kept, schedule = MicroBatchBytes.of(config, bounds, setting), make_schedule(config, micro_batches)
    sizes = parameters_by_stage(config, bounds)
    return [
        stage_memory(config, kept, each, bounds, stage, schedule, replicas).peak for stage, each in enumerate(sizes)
    ]


def describe_checkpointing(config: Config, chosen: Config, memory: float | None) -> str | None:
    """What ``auto`` became, in one line; None: the configuration does not ask for it.

    Args:
        chosen, memory: the result of `with_checkpointing`, and its argument.
    """
    if config.parallel.activation_checkpointing != "auto":
        return None
    asked = "parallel.activation_checkpointing=auto"
    if memory is None:
        return f"{asked}: the memory of the devices is unknown, so that nothing is computed again"
    stage, parts = 0, []
    for setting, run in groupby(chosen.parallel.checkpointing_of(s) for s in range(config.parallel.pipeline_stages)):
        last = stage + len(list(run)) - 1
        stages = f"stage {stage}" if last == stage else f"stages {stage} to {last}"
        parts.append(f"{str(setting).lower()} on {stages}")
        stage = last + 1
    return (
        f"{asked}: {', '.join(parts)}, for {USABLE:.0%} of {memory / 1e9:,.{1 if memory >= 1e9 else 3}f} GB a process"
    )
