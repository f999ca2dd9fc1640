"""What the simulation of a configuration needs: seconds of each stage's passes, and bytes over each boundary."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lime_dist.config.registry import SCHEDULES
from lime_dist.config.schema import Config
from lime_dist.data.documents import attention_length
from lime_dist.model import cost
from lime_dist.model.architecture import architecture_of
from lime_dist.pipeline.boundaries import stage_boundaries
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.shared_weights import boundary_prices
from lime_dist.plan.simulate import StageTimes


def stage_times(config: Config, flops_per_second: float, bounds: Sequence[int] | None = None) -> list[StageTimes]:
    """Seconds by stage of a micro-batch's passes, at the same speed on all stages.

    Counts the matrix products that cost.py counts, with the head on the last stage; with activation checkpointing, the
    backward pass repeats the forward pass of the decoder layers, or of their feed-forward halves. (`forecast.machine_times` adds
    memory traffic.)

    Args:
        flops_per_second: speed of one stage.
        bounds: the cuts, if they are known.

    Raises:
        ValueError: a speed that is not above 0.
    """
    if not flops_per_second > 0:
        raise ValueError(f"flops_per_second={flops_per_second} must be above 0")
    model = config.model
    scale = config.train.micro_batch_size * config.data.sequence_length / flops_per_second
    length: float = config.data.sequence_length
    if not architecture_of(model).needs_tensor_mask:  # a mask that is a tensor saves no work
        length = attention_length(config.data, model.vocab_size)
    bounds, prices = stage_bounds(config) if bounds is None else bounds, boundary_prices(config)
    times = []
    defers_weights = SCHEDULES[config.pipeline.schedule].splits_backward
    for part, (start, stop) in enumerate(pairwise(bounds)):
        flops = sum(cost.layer_flops(model, length, range(start, stop), prices), cost.Flops(0.0, 0.0))
        checkpointing = config.parallel.checkpointing_of(part % config.parallel.pipeline_stages)
        if checkpointing == "selective":
            flops += cost.Flops(0.0, (stop - start) * architecture_of(model).feed_forward_flops(defers_weights))
        elif checkpointing:
            flops += cost.Flops(0.0, flops.forward)
        if stop == bounds[-1]:
            flops += cost.head_flops(model)
        times.append(StageTimes(flops.forward * scale, flops.backward * scale, flops.weights * scale))
    return times


def boundary_bytes(config: Config, bounds: Sequence[int] | None = None) -> list[int]:
    """Bytes by boundary of one micro-batch's payload, in the form in which it is sent."""
    return [boundary.nbytes for boundary in stage_boundaries(config, bounds)]
