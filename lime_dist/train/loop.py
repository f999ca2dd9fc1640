"""The training loop: steps, validations and records."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean, median

import torch

from lime_dist.config.schema import Config
from lime_dist.data.state import TrainState
from lime_dist.distributed import together
from lime_dist.errors import LimeError
from lime_dist.model.architecture import architecture_of
from lime_dist.model.mean_weights import MeanWeights
from lime_dist.monitor.console import duration
from lime_dist.monitor.peak import measured_flops
from lime_dist.monitor.routers import has_map, has_mean_map
from lime_dist.monitor.tags import SET_PREFIX
from lime_dist.train.measurements import Interval, Measurements, interval_record, stage_scalars
from lime_dist.train.profile import Profiler
from lime_dist.train.run import Metrics, Run
from lime_dist.train.signals import StopSignals
from lime_dist.train.step_end import StepEnd
from lime_dist.train.stragglers import Stragglers, slowness, stage_flops

RECENT_STEPS = 20
"""A console line gives the median speed of this many steps."""


@dataclass(frozen=True)
class _Recent:
    """What a console line summarises: the losses since the last line, whose mean it gives, and the seconds of recent steps."""

    losses: list[float] = field(default_factory=list)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        validation_loss: of the last state, as `validate` returns it; None: the run has no validation, or was stopped.
        stopped_by: what stopped the run before its end; None: nothing did.
        time_split: on rank 0, seconds of this start by kind of work, the mean over ranks; {} on the others.
    """

    state: TrainState
    validation_loss: float | None
    stopped_by: str | None
    time_split: dict[str, float]


def train(run: Run, state: TrainState) -> Outcome:
    """Train from ``state`` until ``train.steps`` or a signal; the last state is saved. All ranks must call it."""
    settings = run.config.train
    if state.step < settings.steps and run.engine.needs_warm_up:
        begin = time.perf_counter()
        run.engine.warm_up()
        run.console.say(f"warm-up: every stage ran a micro-batch of zeros, in {time.perf_counter() - begin:.1f} s")
    recent = _Recent()
    validated: tuple[int, float] | None = None
    measurements = Measurements(run, _peak_flops(run))
    watched = run.config.monitor
    stragglers = Stragglers(watched.straggler_share, 60 * watched.straggler_minutes)
    run.console.start(state.step, settings.steps)
    run.engine.start_after(state.step)
    with StopSignals() as signals:
        step_end = StepEnd(run, signals, state)
        while state.step < settings.steps and step_end.stopped_by is None:
            state, loss = _step(run, state, recent, measurements, stragglers)
            step_end.check_update(state, loss)
            if run.profiler is not None and run.profiler.is_over:
                write_profile(run, run.profiler)
            if _due(run.config.monitor.router_interval, state.step):
                _draw_routers(run, state)
            if _due(settings.evaluation_interval, state.step) and run.validates:
                validated = (state.step, validate(run, state))
            if run.sampler is not None and _due(run.sampler.interval, state.step):
                run.records.write_texts(state.step, run.sampler.texts(state.step))
            now = validated[1] if validated is not None and validated[0] == state.step else None
            after = step_end.finish(state, loss, now)
            if after.step < state.step and recent.losses:
                recent.losses.pop()  # a spike, which the run went back from
            state = after
        if step_end.stopped_by is None:
            step_end.save_last(state)
            if run.validates and (validated is None or validated[0] != state.step):
                validated = (state.step, validate(run, state))
                step_end.keep_best(state, validated[1])
    run.console.close()
    if run.profiler is not None and run.profiler.stop(run.engine):
        run.console.say(
            f"no profile of steps {run.profiler.steps}: the run was stopped before step {run.profiler.steps.last}"
        )
    last_loss = validated[1] if validated and step_end.stopped_by is None else None
    return Outcome(state, last_loss, step_end.stopped_by, measurements.time_split())


def validate(run: Run, state: TrainState) -> float:
    """The loss over the validation samples, and over each set of ``data.validation``; also recorded and printed. All ranks must
    call it.

    Returns:
        The loss over the data's own validation split; the mean over the sets if it has none.
    """
    begin = time.perf_counter()
    losses: dict[str, float] = {}
    for name, data in run.validation_sets.items():
        batches = None if data.batches is None else iter(data.batches)
        losses[name] = run.engine.evaluate(batches, data.micro_batches, counted_share=data.counted_share)
    if run.evaluation_micro_batches:
        own = None if run.validation_batches is None else iter(run.validation_batches)
        loss = run.engine.evaluate(own, run.evaluation_micro_batches)
    else:
        loss = fmean(losses.values())
    record: Metrics = {"validation_loss": loss, **{f"{SET_PREFIX}{name}": each for name, each in losses.items()}}
    seconds = time.perf_counter() - begin
    run.records.write({**_position(run.config, state), **record, "seconds_validation": seconds})
    run.records.flush()
    each_set = "".join(f" | {name} {each:.4f}" for name, each in losses.items())
    run.console.say(f"step {state.step}/{run.config.train.steps} | validation loss {loss:.4f}{each_set}")
    return loss


def write_profile(run: Run, profiler: Profiler) -> None:
    """Write the traces of all ranks and their summary. A disk that refuses does not stop training. All ranks must call it."""
    with run.engine.watching(f"writing the profile of steps {profiler.steps}"):
        try:
            together(lambda: profiler.write_trace(run.engine.global_rank))
            ranks = run.control.gather(profiler.summary(run.engine))
            written = together(lambda: profiler.write_summary(ranks) if ranks else None)
        except LimeError as error:
            run.console.say(f"{error}; training continues")
        else:
            run.console.say(f"profile of steps {profiler.steps}: {written}; the traces beside it open in Perfetto")


def _step(
    run: Run, state: TrainState, recent: _Recent, measurements: Measurements, stragglers: Stragglers
) -> tuple[TrainState, float]:
    """One step and its record; returns the state after it and its loss."""
    config, settings = run.config, run.config.train
    lr, router_lr = run.optimizer.learning_rates()
    begin = time.perf_counter()
    batch_size = run.batch_sizes.at(state.consumed_samples)
    tokens = batch_size * config.data.sequence_length
    profiling = nullcontext() if run.profiler is None else run.profiler.step(state.step + 1, run.engine)
    with profiling, measurements.step(tokens):
        loss = run.engine.train_step(run.train_batches, batch_size // (settings.micro_batch_size * run.replicas))
    seconds = time.perf_counter() - begin
    state = TrainState(state.step + 1, state.consumed_samples + batch_size)
    recent.seconds.append(seconds)
    recent.losses.append(loss)
    record: Metrics = {
        **_position(config, state),
        "loss": loss,
        "grad_norm": run.optimizer.gradient_norm,
        "lr": lr,
        "router_lr": router_lr,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    logs = state.step % settings.log_interval == 0 or state.step == settings.steps
    if logs and (intervals := measurements.gather(state.step)):
        record |= interval_record(config, intervals)
        run.records.draw(
            state.step, {**stage_scalars(intervals), **_name_stragglers(run, state, intervals, stragglers)}
        )
    run.records.write(record)
    run.console.advance()
    if logs:
        finite = [loss for loss in recent.losses if math.isfinite(loss)]
        typical, mean_loss = median(recent.seconds), fmean(finite or recent.losses)
        line = {**record, "loss": mean_loss, "step_seconds": typical, "tokens_per_second": tokens / typical}
        run.console.step_line(line, settings.steps)
        recent.losses.clear()
    return state, loss


def _name_stragglers(
    run: Run, state: TrainState, intervals: Sequence[Interval], stragglers: Stragglers
) -> dict[str, float]:
    """Say which ranks have been slow for long; returns the scalars of the slowest rank, {} if there is only one rank."""
    if len(intervals) == 1:
        return {}
    ratios = slowness(intervals, stage_flops(run.config, run.engine.module.bounds))
    now = time.perf_counter()
    for rank, seconds in stragglers.observe(ratios, now - intervals[0].step_seconds, now):
        run.console.say(
            f"warning: step {state.step}: {run.engine.placement.name(rank)}, stage {intervals[rank].stage}, has been slow for "
            f"{duration(seconds)}: its computation takes {ratios[rank]:.2f} times as long as the median of its equals "
            "(python -m lime_dist.doctor --compute tests the devices)"
        )
    slowest = max(ratios, key=ratios.__getitem__)
    return {"speed/slowest_rank": slowest, "speed/slowest_over_median": ratios[slowest]}


def _draw_routers(run: Run, state: TrainState) -> None:
    """Draw what the layers read, if there is a map of it: from the router weights of all stages of replica 0, or where weights depend
    on the token, from their means over a micro-batch of validation samples on every replica. All ranks must call it."""
    model = run.config.model
    reads_samples = has_mean_map(model) and run.validates
    if not (has_map(model) or reads_samples):
        return
    wanted = set(architecture_of(model).router_parameters) if run.replica == 0 else set()
    own = {
        name: weight.detach().to("cpu", torch.float32, copy=True)  # a view would be sent with the whole stage's memory
        for name, weight in run.optimizer.parameters.items()
        if name in wanted
    }
    with run.engine.watching(f"gathering the routers' weights after step {state.step}"):
        means = _mean_weights(run) if reads_samples else MeanWeights()
        stages = run.control.gather((own, means))
    if stages:
        from lime_dist.monitor.pictures import router_pictures

        chosen = run.config.monitor.router_layer
        weights = {name: weight for parameters, _ in stages for name, weight in parameters.items()}
        weights |= MeanWeights().merge(means for _, means in stages).by_name()
        last = model.num_hidden_layers - 1
        pictures = router_pictures(model, weights, last if chosen is None else chosen)
        run.records.draw(state.step, {}, pictures)


def _mean_weights(run: Run) -> MeanWeights:
    """The mean weights of this stage's reads over the first micro-batch of the validation samples, or else of the first set."""
    sets = (data.batches for data in run.validation_sets.values())
    batches = run.validation_batches if run.evaluation_micro_batches else next(sets)
    return run.engine.read_mean_weights(None if batches is None else iter(batches), 1)


def _peak_flops(run: Run) -> float:
    """Peak FLOPs per second of this rank's device, as configured or measured."""
    configured = run.config.monitor.peak_flops
    weights = run.optimizer.flat_weights
    return measured_flops(weights.device, weights.dtype) if configured is None else configured


def _position(config: Config, state: TrainState) -> Metrics:
    """What every record has. ``time`` is in seconds since 1970 (UTC)."""
    return {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "tokens": state.consumed_samples * config.data.sequence_length,
        "time": round(time.time(), 3),
    }


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
