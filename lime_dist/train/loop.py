"""The training loop: steps, validation, checkpoints and records, from finished parts that the entry hands over."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch.distributed as dist

from lime_dist.checkpoint.saver import Saver
from lime_dist.config.schema import Config
from lime_dist.data.loader import TrainBatches, ValidationBatches
from lime_dist.monitor.console import Console
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.pipeline.transfer import Traffic
from lime_dist.train.optim import StageOptimizer
from lime_dist.train.state import TrainState


class RecordSink(Protocol):
    """Something that keeps records: ``metrics.jsonl``, TensorBoard."""

    def write(self, record: dict[str, float | int]) -> None: ...

    def flush(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """The finished parts of a run. The data are None on stages between the first and the last, sinks on all ranks but 0."""

    config: Config
    engine: LimeEngine
    optimizer: StageOptimizer
    train_batches: TrainBatches | None
    validation_batches: ValidationBatches | None
    evaluation_micro_batches: int
    saver: Saver
    console: Console
    sinks: tuple[RecordSink, ...] = ()


def train(run: Run, state: TrainState) -> tuple[TrainState, float | None]:
    """Train from ``state`` to ``train.steps``; returns the last state and validation loss (None without validation)."""
    config, engine, console = run.config, run.engine, run.console
    settings = config.train
    recent: deque[float] = deque(maxlen=20)
    validated: tuple[int, float] | None = None
    saved = state.step
    console.start(state.step, settings.steps)
    while state.step < settings.steps:
        lr, router_lr = run.optimizer.learning_rates()
        begin = time.perf_counter()
        loss = engine.train_step(run.train_batches)
        seconds = time.perf_counter() - begin
        state = TrainState(state.step + 1, state.consumed_samples + settings.global_batch_size)
        recent.append(seconds)
        record: dict[str, float | int] = {
            **_position(config, state),
            "loss": loss,
            "grad_norm": run.optimizer.gradient_norm,
            "lr": lr,
            "router_lr": router_lr,
            "step_seconds": seconds,
            "tokens_per_second": settings.global_batch_size * config.data.sequence_length / seconds,
        }
        _keep(run, record)
        console.advance()
        if not math.isfinite(run.optimizer.gradient_norm):
            console.say(
                f"step {state.step}: loss {loss}, gradient norm {run.optimizer.gradient_norm}; "
                "this update was skipped on all ranks"
            )
        if state.step % settings.log_interval == 0 or state.step == settings.steps:
            typical = median(recent)
            rate = settings.global_batch_size * config.data.sequence_length / typical
            console.step_line({**record, "step_seconds": typical, "tokens_per_second": rate}, settings.steps)
        if _due(settings.evaluation_interval, state.step):
            validated = (state.step, validate(run, state)) if run.evaluation_micro_batches else None
        if _due(settings.checkpoint_interval, state.step):
            save(run, state)
            saved = state.step
    if saved != state.step:
        save(run, state)
    if run.evaluation_micro_batches and (validated is None or validated[0] != state.step):
        validated = (state.step, validate(run, state))
    console.close()
    return state, validated[1] if validated else None


def validate(run: Run, state: TrainState) -> float:
    """Loss over the fixed validation samples, recorded and printed."""
    batches = iter(run.validation_batches) if run.validation_batches is not None else None
    loss = run.engine.evaluate(batches, run.evaluation_micro_batches)
    _keep(run, {**_position(run.config, state), "validation_loss": loss})
    _flush(run)
    run.console.say(f"step {state.step}/{run.config.train.steps} | validation loss {loss:.4f}")
    return loss


def save(run: Run, state: TrainState) -> None:
    """Write a checkpoint and say where it is."""
    _flush(run)
    with run.engine.watching(f"the checkpoint of step {state.step}"):
        saved = run.saver.save(state)
    run.console.say(f"step {state.step}/{run.config.train.steps} | saved {saved.path} in {saved.blocked:.1f} s")
    for line in saved.problems:
        run.console.say(line)


def describe_traffic(engine: LimeEngine) -> list[str]:
    """One line a boundary of the first replica: what crossed it, and how long its ends waited; called by all ranks."""
    own = (engine.grid.get_data_parallel_rank(), engine.stage_id, engine.traffic())
    found: list[tuple[int, int, dict[str, Traffic]] | None] = [None] * dist.get_world_size()
    with engine.watching("the end of the run"):
        dist.all_gather_object(found, own)
    stages = {stage: traffic for replica, stage, traffic in filter(None, found) if replica == 0}
    lines = []
    for stage in sorted(stages):
        if "sent to next" in stages[stage]:
            there, back = stages[stage]["sent to next"], stages[stage]["received from next"]
            waited = stages[stage + 1]["received from previous"].waited + there.waited
            waited_back = back.waited + stages[stage + 1]["sent to previous"].waited
            lines.append(
                f"stage {stage} to {stage + 1}: {there.bytes / 1e6:,.1f} MB there, {back.bytes / 1e6:,.1f} MB back, "
                f"{there.bytes / max(1, there.transfers) / 1e6:,.2f} MB a micro-batch; "
                f"waited for: {waited:.1f} s there, {waited_back:.1f} s back"
            )
    return lines


def _position(config: Config, state: TrainState) -> dict[str, float | int]:
    return {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "tokens": state.consumed_samples * config.data.sequence_length,
    }


def _keep(run: Run, record: dict[str, float | int]) -> None:
    for sink in run.sinks:
        sink.write(record)


def _flush(run: Run) -> None:
    for sink in run.sinks:
        sink.flush()


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
