"""What `pipeline.boundary` means for a pipeline: what it costs to send an entry or a partial mixture, and which weights several
stages hold because earlier ones add to the mixtures of later readers. Imports no torch.

A router, or the weights of a chunk's summary, belongs to the stage of its layer, or of the chunk's last layer: that stage counts it in
the gradient norm and saves it. The stages that add to its partial mixtures hold a copy, whose gradient is 0 for the entries of
other stages. Once a step, gradients are summed over the stages (`lime_dist.train.stage_optimizer`), so that all of them make the
same update. Every parameter's initial value depends on its name, so that copies start equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from lime_dist.config.schema import Config, ModelConfig
from lime_dist.model.architecture import CHUNKS, Sizes, architecture_of, router_name, stage_layout
from lime_dist.model.chunks import Chunk
from lime_dist.model.crossing import ENTRIES, Cut, Prices
from lime_dist.model.parameters import layer_parameters, stage_parameters
from lime_dist.pipeline.entry_format import prices_by_bytes


def boundary_prices(config: Config, bounds: Sequence[int] | None = None) -> Prices:
    """What it costs to send an entry or a partial mixture over the boundaries of a run.

    Args:
        bounds: the cuts. Only stages with several parts need them, for what they keep; None: as if they kept nothing.
    """
    if config.parallel.parts_per_stage > 1:
        return ENTRIES if bounds is None else Prices(cut=Cut(tuple(bounds), config.parallel.pipeline_stages))
    return {"minimal": prices_by_bytes(config), "entries": ENTRIES}[config.pipeline.boundary]


@lru_cache(maxsize=256)
def later_parameters(config: ModelConfig, layers: range, prices: Prices) -> Sizes:
    """The parameters of later stages of which a stage that holds ``layers`` has a copy, by exported name."""
    layout = stage_layout(config, layers, prices=prices)
    if layout is None:
        return {}
    sizes: Sizes = {}
    for layer in layout.later_layers:
        sizes |= router_parameters(config, layer)
    for chunk in layout.later_chunks:
        sizes |= summary_parameters(config, chunk)
    return sizes


def router_parameters(config: ModelConfig, layer: int) -> Sizes:
    """The parameters of a layer's router, by exported name."""
    return {name: size for name, size in layer_parameters(config, layer).items() if name.startswith(router_name(layer))}


def summary_parameters(config: ModelConfig, chunk: Chunk) -> Sizes:
    """The weight of a chunk's summary, by exported name."""
    return {f"{CHUNKS}{chunk.index}.weight": architecture_of(config).summary_parameters(chunk)}


def shared_parameters(config: Config, bounds: Sequence[int]) -> Sizes:
    """The parameters of routers and summaries that several stages hold, in the same order on all ranks."""
    prices, shared = boundary_prices(config), Sizes()
    for start, stop in pairwise(bounds):
        shared |= later_parameters(config.model, range(start, stop), prices)
    return dict(sorted(shared.items()))


def parameters_by_stage(config: Config, bounds: Sequence[int]) -> list[Sizes]:
    """All parameters of every stage, by exported name."""
    stages = config.parallel.pipeline_stages
    cut = Cut(tuple(bounds), stages)
    return [
        {name: size for layers in cut.of_stage(stage) for name, size in parameters_of_stage(config, layers).items()}
        for stage in range(stages)
    ]


def parameters_of_stage(config: Config, layers: range) -> Sizes:
    """All parameters that a stage holds: its own, and its copies of later routers and summaries."""
    return stage_parameters(config.model, layers) | later_parameters(config.model, layers, boundary_prices(config))
