"""Findings about software, the size of the job, data and disks from the facts of all hosts: one pure function per check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from lime_dist.config.deepspeed import batch_split
from lime_dist.contract import SUPPORTED, unsupported
from lime_dist.data.doubtful import doubtful_settings
from lime_dist.doctor.facts import Facts
from lime_dist.doctor.findings import Finding, Findings, Job, differing, everywhere, groups_of, listed, size
from lime_dist.doctor.transferred_bytes import bytes_between_hosts
from lime_dist.errors import LimeError
from lime_dist.model.cost import count_parameters
from lime_dist.pipeline.boundaries import describe_boundaries
from lime_dist.pipeline.checkpointing_choice import describe_checkpointing, with_checkpointing
from lime_dist.pipeline.partition import memory_costs, stage_bounds
from lime_dist.pipeline.placement import AXES, describe_placement, process_grid

CHECKPOINT_BYTES = 12
"""Bytes per parameter: float32 weight and both moments."""


def check_hosts(job: Job, facts: Sequence[Facts]) -> list[Finding]:
    """All findings about the hosts that answered, except the network's; ``facts`` in the order of the hostfile."""
    checks: list[Callable[[Job, Sequence[Facts]], Findings]] = [
        versions, same_code, same_config, split, placement, boundaries, data, fit, doubtful, disk, memory, accelerators,
    ]  # fmt: skip
    if len(facts) > 1:
        checks += [run_folder]
    return [finding for check in checks for finding in check(job, facts)]


# -- software ---------------------------------------------------------------------------------------------------------


def versions(job: Job, facts: Sequence[Facts]) -> Findings:
    """Versions are equal on all hosts, and supported."""
    equal = []
    for name in facts[0].versions:
        groups = groups_of(facts, partial(_version_of, name))
        if len(groups) > 1:
            yield Finding("error", f"{name} differs: {differing(groups)}; install the same environment on all hosts")
        else:
            equal.append(f"{name} {next(iter(groups))}")
        for installed, hosts in groups.items():
            if name in SUPPORTED and (reason := unsupported(name, installed)):
                yield Finding("error", f"{name} {installed} on {listed(hosts)}: {reason}")
    if equal:
        yield Finding("ok", f"{', '.join(equal)} {everywhere(facts)}")


def _version_of(name: str, fact: Facts) -> str:
    return fact.versions[name]


def same_code(job: Job, facts: Sequence[Facts]) -> Findings:
    groups = groups_of(facts, lambda fact: fact.code[:12])
    if len(groups) > 1:
        yield Finding(
            "error",
            f"the program's source files differ: {differing(groups)}; put the repository on a shared file system, or "
            "copy it again",
        )
    else:
        yield Finding("ok", f"the same source files ({next(iter(groups))}) {everywhere(facts)}")


def same_config(job: Job, facts: Sequence[Facts]) -> Findings:
    for fact in facts:
        if fact.config_problem:
            yield Finding("error", f"{fact.host}: {fact.config_problem}")
    groups = groups_of([fact for fact in facts if fact.config], lambda fact: fact.config[:12])
    if len(groups) > 1:
        yield Finding("error", f"the configuration differs: {differing(groups)}; give all hosts the same --config file")
    elif groups and all(fact.config for fact in facts):
        yield Finding("ok", f"the same configuration ({next(iter(groups))}) {everywhere(facts)}")


# -- the job on these hosts -------------------------------------------------------------------------------------------


def split(job: Job, facts: Sequence[Facts]) -> Findings:
    """The stages divide the processes, the micro-batches divide the batch."""
    try:
        width, micro_batches = batch_split(job.config, job.world_size)
    except LimeError as error:
        yield Finding("error", str(error))
        return
    stages = job.config.parallel.pipeline_stages
    yield Finding("ok", f"{stages} stage(s) × {width} replica(s), {micro_batches} micro-batches per step and replica")
    if stages > 1 and micro_batches < stages:
        yield Finding(
            "warning",
            f"{micro_batches} micro-batches for {stages} stages: most stages idle most of the time; raise "
            "train.global_batch_size or lower train.micro_batch_size",
        )


def placement(job: Job, facts: Sequence[Facts]) -> Findings:
    """Report the host of each stage, and warn if the other order of ranks would transfer far fewer bytes between hosts."""
    parallel = job.config.parallel
    if job.world_size % parallel.pipeline_stages or len(job.slots) == 1:
        return
    width = job.world_size // parallel.pipeline_stages
    sent = {topology: bytes_between_hosts(job.config, job.hosts, topology) for topology in AXES}
    own = sent[parallel.topology]
    grid = process_grid(parallel.pipeline_stages, width, parallel.topology)
    yield Finding("ok", f"{describe_placement(grid, job.hosts)}; {size(own)} between hosts per step")
    other = next(topology for topology in AXES if topology != parallel.topology)
    if sent[other] < own / 2:
        yield Finding(
            "warning",
            f"parallel.topology={parallel.topology} sends {size(own)} between hosts per step, {other} would send "
            f"{size(sent[other])}: set parallel.topology={other}",
        )


def boundaries(job: Job, facts: Sequence[Facts]) -> Findings:
    """Report what crosses each boundary."""
    for line in describe_boundaries(job.config):
        yield Finding("ok", line)


def memory(job: Job, facts: Sequence[Facts]) -> Findings:
    """Compare the peak memory of the stages on a host with the memory of each GPU, or of the host on CPUs."""
    stages = job.config.parallel.pipeline_stages
    if job.world_size % stages:
        return
    least = min(_memory_of_process(job, fact) for fact in facts)
    try:
        config = with_checkpointing(job.config, least, job.world_size)
    except LimeError:  # reported by `split`
        return
    if (choice := describe_checkpointing(job.config, config, least)) is not None:
        yield Finding("ok", choice)
    bounds, cost = stage_bounds(config), memory_costs(config)
    of_parts = [float(cost(part)[begin, end]) for part, (begin, end) in enumerate(pairwise(bounds))]
    need = [sum(of_parts[stage::stages]) for stage in range(stages)]
    grid = process_grid(stages, job.world_size // stages, config.parallel.topology)
    by_host: dict[str, list[float]] = {}
    for rank, host in enumerate(job.hosts):
        by_host.setdefault(host, []).append(need[grid.get_coord(rank).pipe])
    short = False
    for fact in facts:
        on_gpu = fact.on_gpu
        needed = max(by_host[fact.host]) if on_gpu else sum(by_host[fact.host])
        available = min(fact.gpus) if on_gpu else fact.free_memory
        if needed > available:
            short = True
            yield Finding(
                "error",
                f"{fact.host}: needs up to {size(needed)} of {'GPU ' if on_gpu else ''}memory, but only {size(available)} "
                "is available; use more stages, parallel.activation_checkpointing=auto, or a smaller train.micro_batch_size",
            )
    if not short:
        yield Finding("ok", f"memory: stages need up to {size(max(need))} each, which is available {everywhere(facts)}")


def _memory_of_process(job: Job, fact: Facts) -> float:
    """Bytes that a process has on a host."""
    return min(fact.gpus) if fact.on_gpu else fact.free_memory / job.slots[fact.host]


def accelerators(job: Job, facts: Sequence[Facts]) -> Findings:
    """Either all hosts have a GPU per process, or none has a GPU."""
    users = [fact for fact in facts if fact.on_gpu]
    if users and len(users) < len(facts):
        without = [fact.host for fact in facts if fact not in users]
        yield Finding(
            "error",
            f"{listed(without)} would train on CPUs, the others on GPUs; repair the driver, or remove the host from the hostfile",
        )
    for fact in users:
        if len(fact.gpus) < job.slots[fact.host]:
            yield Finding(
                "error",
                f"{fact.host}: {len(fact.gpus)} GPUs for {job.slots[fact.host]} processes; lower its slots in the hostfile",
            )


# -- data and disks ---------------------------------------------------------------------------------------------------


def data(job: Job, facts: Sequence[Facts]) -> Findings:
    for fact in facts:
        for problem in fact.data_problems[:3]:
            yield Finding("error", f"{fact.host}: {problem}")
        if len(fact.data_problems) > 3:
            yield Finding("error", f"{fact.host}: {len(fact.data_problems) - 3} more shards have problems")
    groups = groups_of([fact for fact in facts if fact.data], lambda fact: fact.data[:12])
    if len(groups) > 1:
        yield Finding(
            "error",
            f"dataset.json differs: {differing(groups)}; copy the shards again, or put them on a shared file system",
        )
    elif groups and not any(fact.data_problems for fact in facts):
        yield Finding("ok", f"{facts[0].shards} shards match dataset.json {everywhere(facts)}")


def fit(job: Job, facts: Sequence[Facts]) -> Findings:
    """What pretrain.py would refuse before its first step: data and run folder that do not fit the configuration."""
    asked = [fact for fact in facts if fact.config and not fact.data_problems]
    for refusal in dict.fromkeys(line for fact in asked for line in fact.refusals):
        hosts = [fact.host for fact in asked if refusal in fact.refusals]
        yield Finding("error", f"{listed(hosts)}: {refusal}")
    if asked and not any(fact.refusals for fact in asked):
        yield Finding("ok", f"data and run folder fit the configuration {everywhere(asked)}")


def doubtful(job: Job, facts: Sequence[Facts]) -> Findings:
    """Settings that are possible, but most likely not meant, and what the run makes of open ones."""
    for line in doubtful_settings(job.config):
        yield Finding("warning", line)
    for line in dict.fromkeys(line for fact in facts for line in fact.warnings):
        yield Finding("warning", line)
    for line in dict.fromkeys(line for fact in facts for line in fact.notes):
        yield Finding("ok", line)


def disk(job: Job, facts: Sequence[Facts]) -> Findings:
    """Check that there is space for two checkpoints (one complete, one being written) and for all that the run will keep."""
    train = job.config.train
    one = CHECKPOINT_BYTES * count_parameters(job.config.model)
    kept = max(1, train.steps // train.checkpoint_interval if train.checkpoint_interval else 1)
    if train.keep_last is not None:
        kept = min(kept, train.keep_last + (train.steps // train.keep_every if train.keep_every else 0))
    short = False
    for fact in facts:
        if not fact.config:
            continue
        if fact.free_disk < 2 * one:
            short = True
            yield Finding(
                "error",
                f"{fact.host}: {size(fact.free_disk)} free for run.directory, two checkpoints need {size(2 * one)}; "
                "free up space, or choose another run.directory",
            )
        elif fact.free_disk < (kept + 1) * one:
            short = True
            yield Finding(
                "warning",
                f"{fact.host}: {size(fact.free_disk)} free for run.directory, {kept} checkpoints of {size(one)} will be "
                "kept; lower train.keep_last, or free up space",
            )
    if not short:
        yield Finding("ok", f"disk: space for {kept} checkpoints of {size(one)} {everywhere(facts)}")


def run_folder(job: Job, facts: Sequence[Facts]) -> Findings:
    blind = [fact.host for fact in facts if fact.sees_probe is False]
    if blind:
        yield Finding(
            "error",
            f"{listed(blind)} does not see the folder of run.directory={job.config.run.directory}; all hosts write "
            "checkpoints there: put it on a shared file system",
        )
    elif facts[0].sees_probe is None:
        yield Finding(
            "warning",
            f"run.directory={job.config.run.directory} cannot be written here; could not check whether all hosts share it",
        )
    else:
        yield Finding("ok", f"run.directory is the same folder {everywhere(facts)}")
