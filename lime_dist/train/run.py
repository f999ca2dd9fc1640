"""The finished parts of a run, which the entry builds and the loop uses."""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.checkpoint.saver import Saver
from lime_dist.config.schema import Config
from lime_dist.data.loader import TrainBatches, ValidationBatches
from lime_dist.data.order import Order
from lime_dist.data.ramp import BatchSizes
from lime_dist.monitor.console import Console
from lime_dist.monitor.records import Records
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.train.control import Control
from lime_dist.train.optim import StageOptimizer


@dataclass(frozen=True)
class Run:
    """The finished parts of a run. The data are None on stages between the first and the last."""

    config: Config
    engine: LimeEngine
    optimizer: StageOptimizer
    order: Order
    batch_sizes: BatchSizes
    train_batches: TrainBatches | None
    validation_batches: ValidationBatches | None
    evaluation_micro_batches: int
    saver: Saver
    control: Control
    console: Console
    records: Records

    @property
    def replica(self) -> int:
        return int(self.engine.grid.get_data_parallel_rank())

    @property
    def replicas(self) -> int:
        return int(self.engine.dp_world_size)
