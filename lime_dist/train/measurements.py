"""What every rank measures between two console lines, and the metrics that rank 0 derives from it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import mean

import torch
import torch.distributed as dist

from lime_dist.config.schema import Config
from lime_dist.data.documents import attention_length
from lime_dist.model import cost
from lime_dist.pipeline.boundaries import boundary_name, stage_boundaries
from lime_dist.pipeline.clock import COMPUTATION, KINDS, TRANSFER, VALIDATION, WAITING
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.pipeline.transfer import TransferStats
from lime_dist.train.replicas import ExchangeStats
from lime_dist.train.run import Run

SENT, RETURNED = "sent to next", "received from next"
"""The two directions of the boundary behind a stage, as the engine names them: payloads, and their gradients."""


@dataclass(frozen=True)
class Interval:
    """What one rank measured in the steps since the last interval.

    Attributes:
        tokens: of the steps, over all replicas.
        step_seconds: sum over the steps.
        seconds: by kind of work (`pipeline.clock`), in the steps and between them.
        bytes: transferred over the boundary behind the stage in the steps, by direction; {} if they are not counted.
        gradient_norm: of this stage's parameters in the newest step, before clipping.
        memory: peak memory of the device so far, in bytes; on a CPU, of the process.
        peak_flops: peak FLOPs per second of the device.
    """

    stage: int
    replica: int
    steps: int
    tokens: int
    step_seconds: float
    seconds: dict[str, float]
    bytes: dict[str, int]
    gradient_norm: float
    memory: int
    peak_flops: float


class Measurements:
    """The measurements of this rank since training began.

    Args:
        peak_flops: peak FLOPs per second of this rank's device.
    """

    def __init__(self, run: Run, peak_flops: float) -> None:
        self._run, self._begin, self._peak_flops = run, time.perf_counter(), peak_flops
        self._first_totals = run.engine.clock.totals()
        self._begin_interval(self._first_totals)

    def _begin_interval(self, totals: dict[str, float]) -> None:
        self._totals = totals  # of the clock, when the interval began
        self._steps, self._tokens, self._step_seconds = 0, 0, 0.0
        self._bytes: dict[str, int] = {}

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Measure a step over ``tokens`` tokens, counted over all replicas."""
        begin, before = time.perf_counter(), transferred_bytes(self._run.engine)
        yield
        self._step_seconds += time.perf_counter() - begin
        self._steps += 1
        self._tokens += tokens
        for direction, count in transferred_bytes(self._run.engine).items():
            self._bytes[direction] = self._bytes.get(direction, 0) + count - before[direction]

    def gather(self, step: int) -> list[Interval]:
        """End the interval. Returns the intervals of all ranks on rank 0, [] on the others; all ranks must call it."""
        run, totals = self._run, self._run.engine.clock.totals()
        interval = Interval(
            stage=run.engine.stage_id,
            replica=run.replica,
            steps=self._steps,
            tokens=self._tokens,
            step_seconds=self._step_seconds,
            seconds={kind: totals[kind] - self._totals[kind] for kind in KINDS},
            bytes=self._bytes,
            gradient_norm=run.optimizer.stage_gradient_norm,
            memory=peak_memory(run.optimizer.flat_weights.device),
            peak_flops=self._peak_flops,
        )
        self._begin_interval(totals)
        with run.engine.watching(f"gathering the measurements of step {step}"):
            return run.control.gather(interval)

    def time_split(self) -> dict[str, float]:
        """Seconds since training began, by kind of work and for the ``rest``: the mean over ranks.

        Returned on rank 0; {} on the others. All ranks must call it.
        """
        totals = self._run.engine.clock.totals()
        own = {kind: totals[kind] - self._first_totals[kind] for kind in KINDS}
        own["rest"] = time.perf_counter() - self._begin - sum(own.values())
        with self._run.engine.watching("the end of the run"):
            by_rank = self._run.control.gather(own)
        return {kind: mean(seconds[kind] for seconds in by_rank) for kind in own} if by_rank else {}


def transferred_bytes(engine: LimeEngine) -> dict[str, int]:
    """Bytes that have crossed the boundary behind this stage, by direction."""
    return {name: stats.bytes for name, stats in engine.transfer_stats().items() if name in (SENT, RETURNED)}


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of tensors on a GPU, else of the process."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def interval_record(config: Config, intervals: Sequence[Interval]) -> dict[str, float]:
    """What an interval adds to the record of its last step: seconds by kind of work, the mean over ranks, and ``mfu``.

    ``mfu`` is model FLOPs over the devices' peak FLOPs. Recomputation for activation checkpointing does not count.
    """
    record = {f"seconds_{kind}": mean(one.seconds[kind] for one in intervals) for kind in KINDS if kind != VALIDATION}
    length = attention_length(config.data, config.model.vocab_size)
    per_token = sum(layer.both for layer in cost.layer_flops(config.model, length))
    per_token += cost.head_flops(config.model).both
    peak = intervals[0].step_seconds * sum(one.peak_flops for one in intervals)
    record["mfu"] = intervals[0].tokens * per_token / peak
    return record


def stage_scalars(intervals: Sequence[Interval]) -> dict[str, float]:
    """The scalars of every stage, by TensorBoard tag: the mean over its replicas; of memory, the maximum.

    Seconds and bytes are per step, bytes per replica too.
    """
    scalars: dict[str, float] = {}
    for stage in sorted({one.stage for one in intervals}):
        replicas = [one for one in intervals if one.stage == stage]
        computing = mean(one.seconds[COMPUTATION] / one.step_seconds for one in replicas)
        waiting = mean((one.seconds[WAITING] + one.seconds[TRANSFER]) / one.steps for one in replicas)
        scalars[f"stage{stage}/gradient_norm"] = replicas[0].gradient_norm
        scalars[f"stage{stage}/memory_bytes"] = max(one.memory for one in replicas)
        scalars[f"stage{stage}/bubble"] = 1 - computing
        scalars[f"stage{stage}/waiting_seconds"] = waiting
        for direction, name in ((SENT, "bytes_there"), (RETURNED, "bytes_back")):
            if direction in replicas[0].bytes:
                scalars[f"boundary{stage}/{name}"] = replicas[0].bytes[direction] / replicas[0].steps
    return scalars


def describe_transfers(engine: LimeEngine) -> list[str]:
    """A line for each boundary of replica 0: what crossed it, counted, and how long its ends waited.

    All ranks must call it.
    """
    own = (engine.grid.get_data_parallel_rank(), engine.stage_id, engine.transfer_stats_of_parts())
    gathered: list[tuple[int, int, dict[str, dict[int, TransferStats]]] | None] = [None] * dist.get_world_size()
    with engine.watching("the end of the run"):
        dist.all_gather_object(gathered, own)
    of_parts = {
        turn * engine.num_stages + stage: {name: by_part.get(turn, TransferStats()) for name, by_part in stats.items()}
        for replica, stage, stats in filter(None, gathered)
        if replica == 0
        for turn in range(len(engine.module.stage_parts))
    }
    config = engine.module.config
    boundaries = stage_boundaries(config, engine.module.bounds)
    lines = []
    for part, boundary in enumerate(boundaries):
        if SENT in of_parts[part]:
            there, back = of_parts[part][SENT], of_parts[part][RETURNED]
            waited = of_parts[part + 1]["received from previous"].waited + there.waited
            waited_back = back.waited + of_parts[part + 1]["sent to previous"].waited
            counted = replace(boundary, nbytes=round(there.bytes / max(1, there.transfers)))
            lines.append(
                f"{boundary_name(config, part)}: {counted}; {there.bytes / 1e6:,.1f} MB there, {back.bytes / 1e6:,.1f} MB back; "
                f"waited {waited:.1f} s there, {waited_back:.1f} s back"
            )
    return lines


def describe_exchange(run: Run) -> list[str]:
    """A line for each stage of replica 0: what it exchanged with the other replicas, counted. All ranks must call it."""
    if run.replicas == 1:
        return []
    gathered: list[tuple[int, int, ExchangeStats] | None] = [None] * dist.get_world_size()
    with run.engine.watching("the end of the run"):
        dist.all_gather_object(gathered, (run.replica, run.engine.stage_id, run.optimizer.replicas.stats))
    lines = []
    for replica, stage, stats in filter(None, gathered):
        if replica == 0:
            line = f"replicas of stage {stage}: {stats.gradient_bytes / 1e6:,.1f} MB of gradients summed"
            line += f", {stats.weight_bytes / 1e6:,.1f} MB of weights gathered" if stats.weight_bytes else ""
            lines.append(f"{line}, in {stats.calls:,} calls")
    return lines
