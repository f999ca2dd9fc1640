"""The process groups of a stage, read from its DeepSpeed module: its replicas, its pipeline, and the stages that share a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from lime_dist.model.transformer import EMBEDDING_WEIGHT
from lime_dist.pipeline.module import LimePipelineModule
from lime_dist.pipeline.shared_weights import later_parameters, shared_parameters


@dataclass(frozen=True)
class ProcessGroups:
    """The process groups that a stage's optimizer communicates over.

    Attributes:
        replicas: the ranks that hold this stage (data parallel).
        pipeline: the ranks of this replica, one per stage.
        tied: by exported name of a tied weight, the ranks of this replica that hold a copy.
        tied_copies: exported names of weights of this stage that another stage counts in the gradient norm.
        shared: by exported name, the number of elements of routers and summaries of which several stages hold a copy; the same on
            all stages.
    """

    replicas: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    tied: Mapping[str, dist.ProcessGroup]
    tied_copies: frozenset[str]
    shared: Mapping[str, int] = field(default_factory=dict)


def tied_communicators(module: LimePipelineModule) -> dict[str, dict[str, Any]]:
    """By exported name: DeepSpeed's group, ranks and module of a weight that two stages share."""
    for comm in module.tied_comms.values():
        if len(set(comm["ranks"])) > 1:
            return {EMBEDDING_WEIGHT: comm}  # the only weight that can be tied
    return {}


def stage_process_groups(module: LimePipelineModule) -> ProcessGroups:
    """The process groups of this rank's stage."""
    grid, tied, config = module.mpu(), tied_communicators(module), module.config
    copies = {
        name for part in module.stage_parts for name in later_parameters(config.model, part.layers, module.prices)
    }
    return ProcessGroups(
        replicas=grid.get_data_parallel_group(),
        pipeline=grid.get_pipe_parallel_group(),
        tied={name: comm["group"] for name, comm in tied.items()},
        tied_copies=frozenset(name for name, comm in tied.items() if module.global_rank != min(comm["ranks"])).union(
            copies
        ),
        shared=shared_parameters(config, module.bounds),
    )


def limits_ctas() -> bool:
    """Whether the CTAs of a transfer can be limited: the processes communicate with NCCL."""
    return bool(dist.get_backend() == dist.Backend.NCCL)


def transfer_options(ctas: int | None) -> Any:
    """Options of one process group of a stage boundary, which limit the CTAs of a transfer; None: the default options. Every group
    needs options of its own, in which torch notes its name and its ranks."""
    if ctas is None or not limits_ctas():
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = ctas
    return options
