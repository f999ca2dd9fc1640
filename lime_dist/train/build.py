"""Builds the engine and the optimizer of one stage from the configuration."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lime_dist.config.registry import LEARNING_RATES, OPTIMIZERS, SCHEDULES
from lime_dist.config.schema import Config
from lime_dist.data.answers import ALL_COUNTED, CountedShares
from lime_dist.model.architecture import architecture_of
from lime_dist.model.scaling import width_multiplier
from lime_dist.pipeline.clock import Clock
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.pipeline.module import LimePipelineModule
from lime_dist.pipeline.process_groups import ProcessGroups, stage_process_groups
from lime_dist.train.stage_optimizer import StageOptimizer


def make_stage_optimizer(
    config: Config, parameters: Mapping[str, nn.Parameter], process_groups: ProcessGroups, clock: Clock | None = None
) -> StageOptimizer:
    """The optimizer that a configuration names, for the parameters of one stage."""
    settings = config.optimizer
    return StageOptimizer(
        parameters,
        groups={name: architecture_of(config.model).parameter_group(name) for name in parameters},
        optimizer=OPTIMIZERS[settings.name](settings),
        learning_rate=LEARNING_RATES[settings.schedule](settings, config.train.steps),
        config=settings,
        zero_stage=config.parallel.zero_stage,
        process_groups=process_groups,
        clock=clock,
        width_multiplier=width_multiplier(config.model),
    )


def build_engine(
    config: Config, verbose: bool = False, counted_shares: CountedShares = ALL_COUNTED, eos: int | None = None
) -> tuple[LimeEngine, StageOptimizer]:
    """Build the engine and the optimizer of this rank's stage; all ranks must call it.

    Args:
        eos: the token that ends every document, for ``data.document_mask``; None: without the mask.
    """
    module = LimePipelineModule(config, verbose)
    clock = Clock(next(module.parameters()).device)
    optimizer = make_stage_optimizer(config, module.exported_parameters, stage_process_groups(module), clock)
    engine_class: type[LimeEngine] = SCHEDULES[config.pipeline.schedule].engine_class()
    return engine_class(module, config, optimizer, clock, counted_shares, eos), optimizer
