"""Search for the stages, parts, micro-batch size and history policy with the shortest step that fits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lime_dist.config.deepspeed import batch_sizes
from lime_dist.config.load import make_config
from lime_dist.config.registry import SCHEDULES
from lime_dist.config.schema import HISTORY_KEYS, Config
from lime_dist.errors import LimeError
from lime_dist.model.architecture import architecture_of
from lime_dist.plan.forecast import Forecast, Machine, forecast

LARGEST_MICRO_BATCH = 64
CLOSE = 0.01
PARTS = (2, 4)
"""Parts a stage that are tried."""


@dataclass(frozen=True)
class Candidate:
    """One combination of settings. ``policy`` is None for a model without a history; ``parts``: a stage holds."""

    stages: int
    micro_batch_size: int
    policy: dict[str, Any] | None
    config: Config
    forecast: Forecast
    parts: int = 1

    def overrides(self, config: Config) -> list[str]:
        """The ``section.key=value`` items that make this combination out of ``config``."""
        items = [f"parallel.pipeline_stages={self.stages}", f"train.micro_batch_size={self.micro_batch_size}"]
        if config.parallel.virtual_stages != self.config.parallel.virtual_stages:
            items.append(f"parallel.virtual_stages={self.config.parallel.virtual_stages}")
        if config.pipeline.schedule != self.config.pipeline.schedule:
            items.append(f"pipeline.schedule={self.config.pipeline.schedule}")
        if config.parallel.stage_layers != self.config.parallel.stage_layers:
            items.append("parallel.stage_layers=null")
        if config.parallel.activation_checkpointing != self.config.parallel.activation_checkpointing:
            items.append("parallel.activation_checkpointing=auto")
        if config.parallel.offload_history != self.config.parallel.offload_history:
            items.append("parallel.offload_history=false")
        if config.train.evaluation_samples != self.config.train.evaluation_samples:
            items.append(f"train.evaluation_samples={self.config.train.evaluation_samples}")
        if self.policy is not None:
            keys = ", ".join(f"{key}: {value}" for key, value in self.policy.items())
            items.append(f"model.lime.history={{{keys}}}")
        return items


@dataclass(frozen=True)
class Sweep:
    """All combinations that were tried.

    Attributes:
        fitting: those that fit in memory, shortest step first.
        too_large: the others, least memory first.
    """

    fitting: list[Candidate]
    too_large: list[Candidate]

    def best(self, count: int) -> list[Candidate]:
        """The fastest that fit. Of micro-batch sizes whose times differ by less than a fraction `CLOSE`, only the largest: it is
        at least as efficient."""
        kept: list[tuple[float, Candidate]] = []
        for candidate in self.fitting:
            for index, (seconds, other) in enumerate(kept):
                same = all(getattr(candidate, key) == getattr(other, key) for key in ("stages", "parts", "policy"))
                if same and candidate.forecast.seconds <= (1 + CLOSE) * seconds:
                    if candidate.micro_batch_size > other.micro_batch_size:
                        kept[index] = (seconds, candidate)
                    break
            else:
                kept.append((candidate.forecast.seconds, candidate))
        return [candidate for _, candidate in kept[:count]]


def sweep(config: Config, machine: Machine, processes: int) -> Sweep:
    """Forecast all combinations of stage counts that divide the processes, micro-batches of 1, 2, 4, … samples that divide the
    batch, and all policies with their default keys (the configured policy with its own). All other settings stay the same,
    except that the stages are cut again.

    Raises:
        LimeError: no combination divides both the processes and the batch.
    """
    candidates = []
    for candidate in settings(config, processes):
        stages, micro_batch_size = candidate.parallel.pipeline_stages, candidate.train.micro_batch_size
        policy = None
        if architecture_of(candidate.model).has_configurable_policy:
            policy = candidate.model.lime.history.model_dump(exclude_none=True)
        candidates.append(
            Candidate(
                stages,
                micro_batch_size,
                policy,
                candidate,
                forecast(candidate, machine, processes),
                candidate.parallel.parts_per_stage,
            )
        )
    if not candidates:
        raise LimeError(
            f"--processes {processes}: no combination of stages and replicas divides "
            f"{' and '.join(f'{key}={size}' for key, size in batch_sizes(config.train).items())}; change one of them"
        )
    return _ranked(candidates, machine)


def with_parts(result: Sweep, machine: Machine, processes: int, count: int) -> Sweep:
    """A sweep with the ``count`` fastest combinations of several stages tried again with several parts a stage."""
    name = next(name for name, schedule in SCHEDULES.items() if schedule.holds_parts)
    more = []
    for candidate in [each for each in result.best(len(result.fitting)) if each.stages > 1][:count]:
        base = candidate.config
        for parts in PARTS:
            if parts == candidate.parts or parts * candidate.stages > base.model.num_hidden_layers:
                continue
            changes = {"virtual_stages": parts, "stage_layers": None, "offload_history": False}
            parallel = base.parallel.model_copy(update=changes)
            pipeline = base.pipeline.model_copy(update={"schedule": name, "engine": SCHEDULES[name].engine})
            config = base.model_copy(update={"parallel": parallel, "pipeline": pipeline})
            planned = forecast(config, machine, processes)
            more.append(replace(candidate, config=config, forecast=planned, parts=parts))
    return _ranked([*result.fitting, *result.too_large, *more], machine)


def _ranked(candidates: Sequence[Candidate], machine: Machine) -> Sweep:
    limit = machine.memory if machine.memory is not None else float("inf")
    return Sweep(
        fitting=sorted((c for c in candidates if c.forecast.peak_memory <= limit), key=lambda c: c.forecast.seconds),
        too_large=sorted(
            (c for c in candidates if c.forecast.peak_memory > limit), key=lambda c: c.forecast.peak_memory
        ),
    )


def settings(config: Config, processes: int) -> Iterator[Config]:
    """The configurations to try. Explicit validation samples that do not divide become the next smaller multiple, at least one."""
    models = [with_policy(config, policy).model for policy in policies(config)]
    for stages in range(1, min(processes, config.model.num_hidden_layers) + 1):
        if processes % stages:
            continue
        parallel = config.parallel
        if stages != parallel.pipeline_stages:
            parallel = parallel.model_copy(update={"pipeline_stages": stages, "stage_layers": None})
            if isinstance(parallel.activation_checkpointing, list):  # of other stages
                parallel = parallel.model_copy(update={"activation_checkpointing": "auto"})
        if parallel.parts > config.model.num_hidden_layers:
            continue
        size = 1
        while size <= LARGEST_MICRO_BATCH:
            wide = size * processes // stages
            if all(samples % wide == 0 for samples in batch_sizes(config.train).values()):
                samples = config.train.evaluation_samples
                fitting = max(samples // wide, 1) * wide if samples else samples
                train = config.train.model_copy(update={"micro_batch_size": size, "evaluation_samples": fitting})
                for model in models:
                    yield config.model_copy(update={"model": model, "train": train, "parallel": parallel})
            size *= 2


def policies(config: Config) -> list[dict[str, Any] | None]:
    """The configured policy, then the others with their defaults; None for a model without a history."""
    if not architecture_of(config.model).has_configurable_policy:
        return [None]
    own = config.model.lime.history.model_dump(exclude_none=True)
    others: list[dict[str, Any] | None] = [{"policy": name, **keys} for name, keys in HISTORY_KEYS.items()]
    return [own, *(other for other in others if other != own)]


def with_policy(config: Config, policy: dict[str, Any] | None) -> Config:
    """The configuration with another history policy."""
    if policy is None:
        return config
    values = config.model_dump(mode="json")
    values["model"]["lime"]["history"] = policy
    return make_config(values, "the sweep")
