"""The training loop: steps, validation and records, from finished parts that the entry hands over."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from lime_dist.config.schema import Config
from lime_dist.data.state import TrainState
from lime_dist.monitor.routers import has_map, weight_names
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.pipeline.transfer import Traffic
from lime_dist.train.boundary import Boundary
from lime_dist.train.measurements import Measurements, stage_scalars, whole_record
from lime_dist.train.run import Run
from lime_dist.train.signals import StopSignals


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        validation_loss: of the last state; None without validation, or if it was stopped.
        stopped: what stopped it before its end; None: nothing did.
        split: on rank 0, seconds of this start by what they went into, the mean over ranks; empty on the others.
    """

    state: TrainState
    validation_loss: float | None
    stopped: str | None
    split: dict[str, float]


def train(run: Run, state: TrainState) -> Outcome:
    """Train from ``state`` to ``train.steps``, or until a signal comes; the last state is on disk then."""
    settings = run.config.train
    recent: deque[float] = deque(maxlen=20)
    validated: tuple[int, float] | None = None
    measurements = Measurements(run)
    run.console.start(state.step, settings.steps)
    run.engine.global_steps = state.step
    with StopSignals() as signals:
        boundary = Boundary(run, signals, state)
        while state.step < settings.steps and boundary.stopped is None:
            state, loss = _step(run, state, recent, measurements)
            boundary.updated(state, loss)
            if has_map(run.config.model) and _due(run.config.monitor.router_interval, state.step):
                _draw_routers(run, state)
            if _due(settings.evaluation_interval, state.step) and run.evaluation_micro_batches:
                validated = (state.step, validate(run, state))
            state = boundary.cross(state, loss)
        if boundary.stopped is None:
            boundary.close(state)
            if run.evaluation_micro_batches and (validated is None or validated[0] != state.step):
                validated = (state.step, validate(run, state))
    run.console.close()
    loss_at_end = validated[1] if validated and boundary.stopped is None else None
    return Outcome(state, loss_at_end, boundary.stopped, measurements.split())


def _step(run: Run, state: TrainState, recent: deque[float], measurements: Measurements) -> tuple[TrainState, float]:
    """One step and its record; the state after it and its loss. ``recent`` holds the seconds of steps."""
    config, settings = run.config, run.config.train
    lr, router_lr = run.optimizer.learning_rates()
    begin = time.perf_counter()
    batch_size = run.batch_sizes.at(state.consumed_samples)
    with measurements.step(batch_size * config.data.sequence_length):
        loss = run.engine.train_step(run.train_batches, batch_size // (settings.micro_batch_size * run.replicas))
    seconds = time.perf_counter() - begin
    state = TrainState(state.step + 1, state.consumed_samples + batch_size)
    recent.append(seconds)
    record: dict[str, float | int] = {
        **_position(config, state),
        "loss": loss,
        "grad_norm": run.optimizer.gradient_norm,
        "lr": lr,
        "router_lr": router_lr,
        "step_seconds": seconds,
        "tokens_per_second": batch_size * config.data.sequence_length / seconds,
    }
    logs = state.step % settings.log_interval == 0 or state.step == settings.steps
    if logs and (found := measurements.gather(state.step)):
        record |= whole_record(config, found)
        run.records.draw(state.step, stage_scalars(found))
    run.records.write(record)
    run.console.advance()
    if logs:
        typical = median(recent)
        rate = batch_size * config.data.sequence_length / typical
        run.console.step_line({**record, "step_seconds": typical, "tokens_per_second": rate}, settings.steps)
    return state, loss


def _draw_routers(run: Run, state: TrainState) -> None:
    """Pictures of what layers read, from the weights of all stages of the first replica."""
    model = run.config.model
    wanted = set(weight_names(model)) if run.replica == 0 else set()
    own = {
        name: weight.detach().to("cpu", torch.float32, copy=True)  # a view would be sent with the whole stage's memory
        for name, weight in run.optimizer.parameters.items()
        if name in wanted
    }
    with run.engine.watching(f"the routers' weights after step {state.step}"):
        parts = run.control.gather(own)
    if parts:
        from lime_dist.monitor.pictures import router_pictures

        chosen = run.config.monitor.router_layer
        weights = {name: weight for part in parts for name, weight in part.items()}
        last = model.num_hidden_layers - 1
        pictures = router_pictures(model, weights, last if chosen is None else chosen)
        run.records.draw(state.step, {}, pictures)


def validate(run: Run, state: TrainState) -> float:
    """Loss over the fixed validation samples, recorded and printed."""
    batches = iter(run.validation_batches) if run.validation_batches is not None else None
    begin = time.perf_counter()
    loss = run.engine.evaluate(batches, run.evaluation_micro_batches)
    seconds = time.perf_counter() - begin
    run.records.write({**_position(run.config, state), "validation_loss": loss, "seconds_validation": seconds})
    run.records.flush()
    run.console.say(f"step {state.step}/{run.config.train.steps} | validation loss {loss:.4f}")
    return loss


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


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
