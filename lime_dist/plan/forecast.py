"""Forecast what a configuration costs: parameters, FLOPs, memory and bytes per stage, and the time of a step.

Nothing of the model's size is allocated. Neither torch nor DeepSpeed is imported, except for ``pipeline.schedule: stock``,
which is DeepSpeed's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np

from lime_dist.config.deepspeed import batch_split
from lime_dist.config.load import make_config
from lime_dist.config.registry import SCHEDULES
from lime_dist.config.schema import Checkpointing, Config
from lime_dist.data.ramp import BatchSizes
from lime_dist.model import memory_traffic
from lime_dist.model.architecture import BASELINE, model_crossings
from lime_dist.model.crossing import Crossing, Cut
from lime_dist.model.layout import joined
from lime_dist.pipeline.checkpointing_choice import with_checkpointing
from lime_dist.pipeline.memory import ITEM_BYTES, MicroBatchBytes, StageMemory, stage_memory
from lime_dist.pipeline.optimizer_memory import Exchange, exchange_of, layout_of_stage
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.schedules.base import make_schedule
from lime_dist.pipeline.shared_weights import boundary_prices, parameters_by_stage, shared_parameters
from lime_dist.plan.simulate import Link, StageTimes, simulate
from lime_dist.plan.stage_times import boundary_bytes, stage_times
from lime_dist.plan.wavefront import step_seconds


@dataclass(frozen=True)
class Machine:
    """The resources of a process and its links to other processes.

    Attributes:
        flops: FLOPs per second that it reaches in matrix products.
        memory_bandwidth: bytes per second to and from its memory.
        bandwidth: bytes per second to any other process, in each direction.
        latency: seconds between sending a transfer's last byte and its arrival.
        memory: bytes, or None for no limit.
    """

    flops: float
    memory_bandwidth: float
    bandwidth: float
    latency: float
    memory: float | None = None


@dataclass(frozen=True)
class StageForecast:
    """One stage.

    Attributes:
        parts: the decoder layers of each of its parts.
        checkpointing: what it computes again.
        parameters: number of elements, including the embedding and the output projection on their stages.
        forward_flops, backward_flops: of one micro-batch.
        boundary_bytes: of one micro-batch's payloads to the next stage, of all parts; the gradients that come back have as many.
        crossing: what of the layer history these have.
        exchange: with the other replicas of the stage.
    """

    parts: tuple[range, ...]
    checkpointing: Checkpointing
    parameters: int
    forward_flops: float
    backward_flops: float
    memory: StageMemory
    boundary_bytes: int
    crossing: Crossing
    exchange: Exchange


@dataclass(frozen=True)
class Parts:
    """The seconds of a step by cause; their sum is the step. An average stage is idle in all parts but computation.

    The step is bound by computation if it takes longer without transfers than without passes; otherwise it is bound by links.

    Attributes:
        computation: mean computation of a stage.
        imbalance: computation of the busiest stage beyond the mean. 0 if links bind.
        link: the time that transfers add to the step. If links bind: the time in which a stage does not compute.
        bubble: filling and draining the pipeline. 0 if links bind.
        latency: the time that the latency of transfers adds.
        reduction: of gradients over the replicas, as far as the last pass does not hide it, and of weights of several stages, and with
            ZeRO-1 the exchange of updated weights.
    """

    computation: float
    imbalance: float
    link: float
    bubble: float
    latency: float
    reduction: float


@dataclass(frozen=True)
class Forecast:
    """One step of a configuration on a machine.

    Attributes:
        parameters: of the whole model; a tied weight counts once.
        micro_batches: per replica and step.
        tokens: per step, over all replicas.
        seconds: per step.
    """

    stages: list[StageForecast]
    parameters: int
    replicas: int
    micro_batches: int
    tokens: int
    seconds: float
    parts: Parts

    @property
    def bubble(self) -> float:
        """The fraction of the step in which stages do not compute, on average."""
        return max(0.0, 1 - self.parts.computation / self.seconds)

    @property
    def flops(self) -> float:
        """Per step, over all replicas."""
        passes = self.micro_batches * self.replicas
        return passes * sum(stage.forward_flops + stage.backward_flops for stage in self.stages)

    @property
    def peak_memory(self) -> int:
        """Bytes of the stage that needs the most memory."""
        return max(stage.memory.peak for stage in self.stages)

    @property
    def limit(self) -> str:
        """The name of the largest part of the step."""
        parts = vars(self.parts)
        return max(parts, key=lambda name: parts[name])


def forecast(config: Config, machine: Machine, processes: int) -> Forecast:
    """Forecast one training step.

    Raises:
        LimeError: the number of processes is not a multiple of the stages, or the batch does not divide into micro-batches.
    """
    replicas, micro_batches = batch_split(config, processes)
    config = with_checkpointing(config, machine.memory, processes)
    bounds, count = stage_bounds(config), config.parallel.pipeline_stages
    cut = Cut(tuple(bounds), count)
    flops = stage_times(config, 1.0, bounds)
    sizes = boundary_bytes(config, bounds)
    parameters = parameters_by_stage(config, bounds)
    kept, schedule = MicroBatchBytes.of(config, bounds), make_schedule(config, micro_batches)
    crossings = model_crossings(config.model, boundary_prices(config, bounds))
    stages = [
        StageForecast(
            parts=cut.of_stage(stage),
            checkpointing=config.parallel.checkpointing_of(stage),
            parameters=sum(parameters[stage].values()),
            forward_flops=sum(part.forward for part in flops[stage::count]),
            backward_flops=sum(part.backward for part in flops[stage::count]),
            memory=stage_memory(config, kept, parameters[stage], bounds, stage, schedule, replicas),
            boundary_bytes=sum([*sizes, 0][stage::count]),
            crossing=joined(crossings[layers.stop] for layers in cut.of_stage(stage)),
            exchange=exchange_of(config, layout_of_stage(config, parameters[stage], bounds, replicas), replicas),
        )
        for stage in range(count)
    ]
    times = machine_times(config, machine, bounds, flops)
    shared = sum(shared_parameters(config, bounds).values())
    exchanges = [stage.exchange for stage in stages]
    reduction = reduction_seconds(config, exchanges, last_passes(config, times), shared, machine, replicas)
    parts = step_parts(config, times, sizes, machine, micro_batches, reduction)
    seconds = sum(vars(parts).values())
    return Forecast(
        stages=stages,
        parameters=sum({name: size for sizes in parameters for name, size in sizes.items()}.values()),
        replicas=replicas,
        micro_batches=micro_batches,
        tokens=config.train.global_batch_size * config.data.sequence_length,
        seconds=seconds,
        parts=parts,
    )


def whole_run(config: Config, machine: Machine, planned: Forecast) -> tuple[int, float]:
    """Samples that a run consumes, and the seconds of its steps without validations and checkpoints.

    The seconds of a step of a batch ramp are interpolated between those of its first and its last batch size.

    Args:
        planned: the forecast of a step with the whole batch.
    """
    train = config.train
    sizes = BatchSizes(train.global_batch_size, train.batch_ramp)
    if train.batch_ramp is None:
        return sizes.consumed_after(train.steps), train.steps * planned.seconds
    start = train.batch_ramp.start
    first = config.model_copy(
        update={"train": train.model_copy(update={"global_batch_size": start, "batch_ramp": None})}
    )
    shortest = forecast(first, machine, planned.replicas * len(planned.stages)).seconds
    rate = (planned.seconds - shortest) / (train.global_batch_size - start)
    consumed, seconds = 0, 0.0
    for _ in range(train.steps):
        size = sizes.at(consumed)
        seconds += shortest + (size - start) * rate
        consumed += size
    return consumed, seconds


def machine_times(
    config: Config, machine: Machine, bounds: Sequence[int], flops: Sequence[StageTimes]
) -> list[StageTimes]:
    """Seconds by stage of one micro-batch's passes: matrix products, and then all other memory traffic. Weight passes consist of
    products alone.

    Args:
        flops: by stage; the result of `stage_times` at one FLOP per second.
    """
    model, size = config.model, ITEM_BYTES[config.precision]
    tokens = config.train.micro_batch_size * config.data.sequence_length
    prices, times = boundary_prices(config), []
    for part, ((start, stop), each) in enumerate(zip(pairwise(bounds), flops, strict=True)):
        forward, backward = memory_traffic.stage_traffic(model, [range(start, stop)], tokens, size, prices)
        checkpointing = config.parallel.checkpointing_of(part % config.parallel.pipeline_stages)
        if checkpointing == "selective":
            backward += (stop - start) * memory_traffic.feed_forward_traffic(model, tokens, size)
        elif checkpointing:
            backward += forward
        if stop == model.num_hidden_layers:
            head = memory_traffic.head_traffic(model, tokens, size)
            forward, backward = forward + head[0], backward + head[1]
        times.append(
            StageTimes(
                each.forward / machine.flops + forward / machine.memory_bandwidth,
                each.backward / machine.flops + backward / machine.memory_bandwidth,
                each.weights / machine.flops,
            )
        )
    return times


def step_parts(
    config: Config,
    times: Sequence[StageTimes],
    sizes: Sequence[int],
    machine: Machine,
    micro_batches: int,
    reduction: float,
) -> Parts:
    """Attribute the seconds of a step, from how long it takes as it is, without latency, without transfers, and without passes."""
    transfers = [size / machine.bandwidth for size in sizes]
    as_it_is, without_latency, without_transfers, without_passes = _scenarios(
        config, times, transfers, machine.latency, micro_batches
    )
    stages = config.parallel.pipeline_stages
    each_stage = [
        micro_batches * sum(each.forward + each.backward for each in times[stage::stages]) for stage in range(stages)
    ]
    computation, busiest = fmean(each_stage), max(each_stage)
    if without_transfers >= without_passes:
        imbalance, link, bubble = (
            busiest - computation,
            without_latency - without_transfers,
            without_transfers - busiest,
        )
    else:
        imbalance, link, bubble = 0.0, without_latency - computation, 0.0
    latency = as_it_is - without_latency
    return Parts(*(max(0.0, seconds) for seconds in (computation, imbalance, link, bubble, latency, reduction)))


def _scenarios(
    config: Config, times: Sequence[StageTimes], transfers: Sequence[float], latency: float, micro_batches: int
) -> list[float]:
    """Seconds of the step: as it is; without latency; without latency and transfers; without latency and passes.

    A schedule without diagonals is simulated, which gives the same seconds and takes longer.
    """
    schedule = make_schedule(config, micro_batches)
    if schedule.diagonals() is None:
        payloads, nothing = [round(seconds * 1e12) for seconds in transfers], [StageTimes(0.0, 0.0)] * len(times)
        settings = [(times, 1e12, latency), (times, 1e12, 0.0), (times, float("inf"), 0.0), (nothing, 1e12, 0.0)]
        return [
            simulate(each, payloads, Link(bandwidth, delay), schedule).seconds for each, bandwidth, delay in settings
        ]
    forward, backward, weights = (
        np.outer([getattr(each, name) for each in times], [1.0, 1.0, 1.0, 0.0])
        for name in ("forward", "backward", "weights")
    )
    durations = np.outer(transfers, [1.0, 1.0, 0.0, 1.0])
    latencies = np.outer(np.full(len(transfers), latency), [1.0, 0.0, 0.0, 0.0])
    return [float(seconds) for seconds in step_seconds(schedule, forward, backward, weights, durations, latencies)]


def last_passes(config: Config, times: Sequence[StageTimes]) -> list[float]:
    """Seconds by stage of the pass in which its gradients become final, and within which their sums over replicas can start: the last
    backward pass, or the last weight pass. 0 where sums start after all passes: with several parts a stage, and in DeepSpeed's engine."""
    schedule = SCHEDULES[config.pipeline.schedule]
    if config.parallel.parts_per_stage > 1 or schedule.is_blocking:
        return [0.0] * config.parallel.pipeline_stages
    return [each.weights if schedule.splits_backward else each.backward for each in times]


def reduction_seconds(
    config: Config,
    exchanges: Sequence[Exchange],
    last_pass_seconds: Sequence[float],
    shared: int,
    machine: Machine,
    replicas: int,
) -> float:
    """Seconds of the reduction of gradients after the last pass, on the stage that takes longest.

    Over replicas it is a ring, in pieces that follow each other without a wait; what the last pass hides of it is left out. The
    gradient of a tied weight between first and last stage comes after it, then a ring of all stages over the gradients of the
    routers and summaries of which several stages have a copy.

    Args:
        exchanges: with the other replicas, by stage.
        last_pass_seconds: by stage; the result of `last_passes`.
        shared: elements of those routers and summaries.
    """
    model, size = config.model, ITEM_BYTES[config.precision]
    accumulation_bytes, stages = max(4, size), len(exchanges)
    seconds = 2 * (replicas - 1) * machine.latency
    if replicas > 1:
        seconds += max(_after_passes(machine, *each) for each in zip(exchanges, last_pass_seconds, strict=True))
    if model.tie_word_embeddings and stages > 1:
        divided = replicas if config.parallel.zero_stage == 1 else 1  # each replica sums what it updates
        tied = model.vocab_size * model.hidden_size * accumulation_bytes / divided
        seconds += tied / machine.bandwidth + 2 * machine.latency
    if shared:
        hops = 2 * (stages - 1)
        seconds += hops * (shared * accumulation_bytes / stages / machine.bandwidth + machine.latency)
    return seconds


def _after_passes(machine: Machine, exchange: Exchange, last_pass: float) -> float:
    """Seconds that the exchange of a stage takes after its last pass. During that pass gradients become final at a steady rate, from the
    last piece to the first. A fast network then has only the first piece left; a slow one has been busy since the last piece was final."""
    whole = exchange.gradient_bytes + exchange.weight_bytes
    sums = exchange.sent * exchange.gradient_bytes / whole / machine.bandwidth
    late = exchange.late_bytes / exchange.gradient_bytes
    gathering = exchange.sent * exchange.weight_bytes / whole / machine.bandwidth
    return max(late * sums, sums - (1 - late) * last_pass) + gathering


def as_baseline(config: Config) -> Config:
    """The same run without a layer history."""
    values = config.model_dump(mode="json")
    values["model"]["architecture"] = BASELINE
    return make_config(values, "the plan")
