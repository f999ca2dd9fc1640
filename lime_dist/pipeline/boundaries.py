"""What crosses each stage boundary: counts, bytes, and the words of every message about it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lime_dist.config.schema import Config
from lime_dist.model.architecture import model_crossings
from lime_dist.model.crossing import Crossing
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.shared_weights import boundary_prices
from lime_dist.pipeline.wire_format import WireFormat


@dataclass(frozen=True)
class StageBoundary:
    """What crosses the boundary between two stages.

    Attributes:
        crossing: what of the layer history crosses, beside the hidden state.
        nbytes: of one micro-batch's payload, as it is sent; its gradient has as many.
    """

    crossing: Crossing
    nbytes: int

    def __str__(self) -> str:
        """For messages, such as ``12.58 MB a micro-batch: hidden state + 12 slots + 20 partial mixtures``."""
        size = f"{self.nbytes / 1e6:,.2f} MB" if self.nbytes >= 1e6 else f"{self.nbytes / 1e3:,.2f} kB"
        return f"{size} a micro-batch: {self.crossing}"


def stage_boundaries(config: Config, bounds: Sequence[int] | None = None) -> list[StageBoundary]:
    """Every boundary of a pipeline, by the stage before it.

    Args:
        bounds: the cuts, if they are known.
    """
    num_tokens = config.train.micro_batch_size * config.data.sequence_length
    bounds = stage_bounds(config) if bounds is None else bounds
    crossings = model_crossings(config.model, boundary_prices(config))
    return [StageBoundary(crossings[bound], WireFormat.of(config, bound).nbytes(num_tokens)) for bound in bounds[1:-1]]


def describe_boundaries(config: Config, bounds: Sequence[int] | None = None) -> list[str]:
    """A line for every run of boundaries over which the same crosses."""
    lines, stage = [], 0
    for line, run in groupby(stage_boundaries(config, bounds), str):
        first, stage = stage, stage + len(list(run))
        where = (
            f"stage {first} to {stage}" if stage == first + 1 else f"from each stage to the next, {first} to {stage}"
        )
        lines.append(f"{where}: {line}")
    return lines
