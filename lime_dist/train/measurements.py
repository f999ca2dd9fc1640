"""What every rank measures between two console lines, gathered once an interval, and what rank 0 makes of it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean

import torch

from lime_dist.config.schema import Config
from lime_dist.model import cost
from lime_dist.monitor.peak import measured_flops
from lime_dist.pipeline.clock import COMPUTATION, KINDS, TRANSFER, VALIDATION, WAITING
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.train.run import Run

THERE, BACK = "sent to next", "received from next"
"""Directions of the boundary behind a stage, as the engine's traffic names them."""


@dataclass
class Measured:
    """One rank's steps since the last interval.

    Attributes:
        tokens: of the steps, over all replicas.
        step_seconds: of all steps together, from beginning to end.
        seconds: by kind (`pipeline.clock`), steps and what lies between them.
        bytes: by direction of the boundary behind the stage, of the steps alone; {} if nothing is counted.
        gradient_norm: of the stage's part, in the newest step, before clipping.
        memory: the most bytes that the device has held so far; on the CPU the process's.
        peak_flops: what the device reaches at best, a second.
    """

    stage: int
    replica: int
    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    gradient_norm: float = 0.0
    memory: int = 0
    peak_flops: float = 0.0


class Measurements:
    """This rank's, since training began; methods that gather are called by all ranks together."""

    def __init__(self, run: Run) -> None:
        self._run, self._begin = run, time.perf_counter()
        self._start = self._last = run.engine.clock.totals()
        peak = run.config.monitor.peak_flops
        weights = run.optimizer.flat_weights
        self._peak = measured_flops(weights.device, weights.dtype) if peak is None else peak
        self._now = self._fresh()

    def _fresh(self) -> Measured:
        return Measured(self._run.engine.stage_id, self._run.replica)

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Around a step over so many ``tokens`` of all replicas."""
        begin, before = time.perf_counter(), sent_bytes(self._run.engine)
        yield
        now = self._now
        now.step_seconds += time.perf_counter() - begin
        now.steps += 1
        now.tokens += tokens
        for direction, count in sent_bytes(self._run.engine).items():
            now.bytes[direction] = now.bytes.get(direction, 0) + count - before[direction]

    def gather(self, step: int) -> list[Measured]:
        """All ranks' measurements of the interval that ends here, on rank 0; empty on the others."""
        run, now = self._run, self._now
        totals = run.engine.clock.totals()
        now.seconds = {kind: totals[kind] - self._last[kind] for kind in KINDS}
        now.gradient_norm = run.optimizer.stage_gradient_norm.item()
        now.memory = memory_bytes(run.optimizer.flat_weights.device)
        now.peak_flops = self._peak
        self._last, self._now = totals, self._fresh()
        with run.engine.watching(f"the measurements of step {step}"):
            return run.control.gather(now)

    def split(self) -> dict[str, float]:
        """Seconds since training began by kind, the mean over ranks, and the ``rest``; on rank 0, empty on the others."""
        now = self._run.engine.clock.totals()
        own = {kind: now[kind] - self._start[kind] for kind in KINDS}
        own["rest"] = time.perf_counter() - self._begin - sum(own.values())
        with self._run.engine.watching("the end of the run"):
            found = self._run.control.gather(own)
        return {kind: mean(seconds[kind] for seconds in found) for kind in own} if found else {}


def sent_bytes(engine: LimeEngine) -> dict[str, int]:
    """What has crossed the boundary behind this stage, by direction."""
    return {name: traffic.bytes for name, traffic in engine.traffic().items() if name in (THERE, BACK)}


def memory_bytes(device: torch.device) -> int:
    """The most that has been in use so far: of a GPU's memory by tensors, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def whole_record(config: Config, found: Sequence[Measured]) -> dict[str, float]:
    """Keys of the step's record: where the time went since the last such record, mean over ranks, and the share of the
    devices' peak that the model's own FLOPs are (activation checkpointing's repetition not counted)."""
    record = {f"seconds_{kind}": mean(one.seconds[kind] for one in found) for kind in KINDS if kind != VALIDATION}
    per_token = sum(layer.both for layer in cost.layer_flops(config.model, config.data.sequence_length))
    per_token += cost.head_flops(config.model).both
    peak = found[0].step_seconds * sum(one.peak_flops for one in found)
    record["mfu"] = found[0].tokens * per_token / peak
    return record


def stage_scalars(found: Sequence[Measured]) -> dict[str, float]:
    """By TensorBoard tag, of every stage: mean over its replicas, memory the most. Seconds and bytes are those of one step,
    bytes those of one replica."""
    scalars: dict[str, float] = {}
    for stage in sorted({one.stage for one in found}):
        replicas = [one for one in found if one.stage == stage]
        computing = mean(one.seconds[COMPUTATION] / one.step_seconds for one in replicas)
        waiting = mean((one.seconds[WAITING] + one.seconds[TRANSFER]) / one.steps for one in replicas)
        scalars[f"stage{stage}/gradient_norm"] = replicas[0].gradient_norm
        scalars[f"stage{stage}/memory_bytes"] = max(one.memory for one in replicas)
        scalars[f"stage{stage}/bubble"] = 1 - computing
        scalars[f"stage{stage}/waiting_seconds"] = waiting
        for direction, name in ((THERE, "bytes_there"), (BACK, "bytes_back")):
            if direction in replicas[0].bytes:
                scalars[f"boundary{stage}/{name}"] = replicas[0].bytes[direction] / replicas[0].steps
    return scalars
