"""The finished parts of a run, and what `lime_dist.train` needs of checkpoints and of the monitor.

``pretrain.py`` builds them; the loop uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lime_dist.config.schema import Config
from lime_dist.data.loader import TrainBatches, ValidationBatches
from lime_dist.data.order import Order
from lime_dist.data.ramp import BatchSizes
from lime_dist.data.state import TrainState
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.train.control import Control
from lime_dist.train.profile import Profiler
from lime_dist.train.sample_texts import Sampler
from lime_dist.train.stage_optimizer import StageOptimizer

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

Metrics = dict[str, float | int]
"""One record of a run: a step's, or a validation's."""


class SavedCheckpoint(Protocol):
    """A checkpoint that has been saved.

    Attributes:
        blocked: seconds that training waited for it.
        background: seconds that a thread of this rank wrote it; 0: it was saved while training waited.
        problems: on rank 0, a line for each path that could not be deleted and was not named before.
    """

    @property
    def path(self) -> Path: ...
    @property
    def blocked(self) -> float: ...
    @property
    def background(self) -> float: ...
    @property
    def problems(self) -> Sequence[str]: ...


class RestoredCheckpoint(Protocol):
    """A checkpoint that has been loaded."""

    @property
    def path(self) -> Path: ...
    @property
    def state(self) -> TrainState: ...


class CheckpointSaver(Protocol):
    """Saves checkpoints, one at a time. All ranks call ``begin`` and ``finish`` together."""

    @property
    def pending(self) -> TrainState | None:
        """The state whose checkpoint has begun and is not finished."""

    @property
    def writing(self) -> bool:
        """Whether this rank's part of it is still being written."""

    def folder(self, step: int) -> Path: ...

    def improves(self, validation_loss: float) -> bool: ...

    def mark_best(self, state: TrainState, validation_loss: float) -> None: ...

    def begin(self, state: TrainState) -> None: ...

    def finish(self) -> SavedCheckpoint: ...


class RecordLog(Protocol):
    """Keeps the records of a run; on ranks other than 0 its methods do nothing."""

    @property
    def problem(self) -> str | None:
        """Why records cannot be written, in one line; None: they can."""

    @property
    def fatal(self) -> str | None:
        """The same of records that the run needs."""

    def write(self, record: Metrics) -> None: ...

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary] = ()) -> None: ...

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...

    def flush(self) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class ProgressConsole(Protocol):
    """Shows progress; on ranks other than 0 its methods do nothing."""

    def start(self, step: int, steps: int) -> None: ...

    def advance(self) -> None: ...

    def go_back(self, step: int) -> None: ...

    def say(self, line: str) -> None: ...

    def step_line(self, record: Metrics, steps: int) -> None: ...

    def time_split(self, split: dict[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class EvaluationData:
    """What an evaluation of one validation set reads.

    Attributes:
        batches: None on the stages that read no data.
        micro_batches: of each replica.
        counted_share: share of the labels that the loss counts; None: all.
    """

    batches: ValidationBatches | None
    micro_batches: int
    counted_share: float | None


@dataclass(frozen=True)
class Run:
    """The finished parts of a run.

    Attributes:
        train_batches, validation_batches: None on the stages between the first and the last, which read data only
            for ``data.document_mask``.
        evaluation_micro_batches: of each replica in a validation; 0: the data have no validation split, or the run does not read it.
        validation_sets: the other sets that a validation reads, by name.
        profiler: records some steps; None: the run is not profiled.
        sampler: writes the sample texts; None: the run writes none.
        restore: loads the newest whole checkpoint; returns it, or None, and a line for each one that it passed over.
    """

    config: Config
    engine: LimeEngine
    optimizer: StageOptimizer
    order: Order
    batch_sizes: BatchSizes
    train_batches: TrainBatches | None
    validation_batches: ValidationBatches | None
    evaluation_micro_batches: int
    saver: CheckpointSaver
    restore: Callable[[], tuple[RestoredCheckpoint | None, list[str]]]
    control: Control
    console: ProgressConsole
    records: RecordLog
    validation_sets: Mapping[str, EvaluationData] = field(default_factory=dict)
    sampler: Sampler | None = None
    profiler: Profiler | None = None

    @property
    def validates(self) -> bool:
        """Whether the run has any validation."""
        return self.evaluation_micro_batches > 0 or bool(self.validation_sets)

    @property
    def replica(self) -> int:
        """Index of this rank's replica."""
        return int(self.engine.grid.get_data_parallel_rank())

    @property
    def replicas(self) -> int:
        """Data-parallel width."""
        return int(self.engine.dp_world_size)

    def close(self) -> None:
        """Close the records, and stop reading ahead."""
        self.records.close()
        if self.train_batches is not None:
            self.train_batches.close()
