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
    """Every boundary of a pipeline, by the part before it; with one part a stage, by the stage.

    Args:
        bounds: the cuts, if they are known.
    """
    num_tokens = config.train.micro_batch_size * config.data.sequence_length
    bounds = stage_bounds(config) if bounds is None else bounds
    prices = boundary_prices(config, bounds)
    crossings = model_crossings(config.model, prices)
    return [
        StageBoundary(crossings[bound], WireFormat.of(config, bound, prices).nbytes(num_tokens))
        for bound in bounds[1:-1]
    ]


def boundary_name(config: Config, part: int) -> str:
    """The boundary behind a part, for messages; with one part a stage, part and stage are one."""
    stages = config.parallel.pipeline_stages
    if config.parallel.parts_per_stage == 1:
        return f"stage {part} to {part + 1}"
    return f"part {part} to {part + 1} (stage {part % stages} to {(part + 1) % stages})"


def describe_boundaries(config: Config, bounds: Sequence[int] | None = None) -> list[str]:
    """A line for every run of boundaries over which the same crosses."""
    lines, part = [], 0
    kind = "part" if config.parallel.parts_per_stage > 1 else "stage"
    for line, run in groupby(stage_boundaries(config, bounds), str):
        first, part = part, part + len(list(run))
        several = f"from each {kind} to the next, {first} to {part}"
        where = boundary_name(config, first) if part == first + 1 else several
        lines.append(f"{where}: {line}")
    return lines
