"""Plan a run: what it costs per stage and step, and which settings make it faster."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lime_dist.commands import CommandParser
from lime_dist.config.load import load_config
from lime_dist.config.schema import Config
from lime_dist.data.documents import attention_length
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path
from lime_dist.pipeline.checkpointing_choice import describe_checkpointing, with_checkpointing
from lime_dist.plan.forecast import Forecast, Machine, as_baseline, forecast, whole_run
from lime_dist.plan.quantities import read_bandwidth, read_bytes, read_flops, read_seconds, read_share
from lime_dist.plan.sweep import Candidate, Sweep, sweep, with_parts
from lime_dist.plan.text import plan_table, sweep_table

Values = dict[str, Any]
BEST = 5

EXAMPLES = """examples:
  python -m lime_dist.plan --config configs/deep/lime_128.yaml
  python -m lime_dist.plan --config configs/deep/lime_128.yaml --stages 16 --processes 64 --gpu-memory 80GB train.micro_batch_size=1
  python -m lime_dist.plan --config configs/deep/lime_128.yaml --processes 64 --gpu-memory 80GB --bandwidth 200Gbit --sweep
  python -m lime_dist.plan --config configs/quickstart.yaml --flops 40G --efficiency 1 --bandwidth 2GB --timeline timeline.png

Parameters and bytes are exact. Memory is the peak of live tensor bytes; allocator, libraries and context come on top. Time is
the sum of matrix products at --flops × --efficiency, other memory traffic at --memory-bandwidth (a rule of thumb, as if no
operations were fused), transfers and reductions. Left out: the optimizer's update, data, checkpoints."""


def parse() -> argparse.Namespace:
    parser = CommandParser(prog="python -m lime_dist.plan", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--stages", type=int, metavar="P", help="parallel.pipeline_stages")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="number of processes of the job (default: one replica)"
    )
    parser.add_argument("--gpu-memory", type=read_bytes, metavar="80GB", help="limit per process (default: none)")
    parser.add_argument("--memory-bandwidth", type=read_bandwidth, default="3TB", metavar="3TB",
                        help="of a process's memory, per second (default: %(default)s)")  # fmt: skip
    parser.add_argument("--bandwidth", type=read_bandwidth, default="400Gbit", metavar="400Gbit",
                        help="between processes, in each direction, per second (default: %(default)s)")  # fmt: skip
    parser.add_argument("--latency", type=read_seconds, default="5us", metavar="5us",
                        help="of a transfer between processes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--flops", type=read_flops, default="800T", metavar="800T",
                        help="peak of a process, per second (default: %(default)s)")  # fmt: skip
    parser.add_argument("--efficiency", type=read_share, default="0.6", metavar="0.6",
                        help="fraction of the peak that matrix products reach (default: %(default)s)")  # fmt: skip
    parser.add_argument("--sweep", action="store_true",
                        help=f"show the {BEST} fastest combinations of stages, micro-batch and history policy that fit in memory")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the same numbers as JSON")
    parser.add_argument(
        "--timeline", type=user_path, metavar="PNG", help="draw what each stage does at which time (needs matplotlib)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    overrides = list(arguments.overrides)
    if arguments.stages is not None:
        if any(item.startswith("parallel.pipeline_stages=") for item in overrides):
            raise LimeError(
                f"--stages {arguments.stages} and parallel.pipeline_stages=… say the same; give one of them"
            )
        overrides.append(f"parallel.pipeline_stages={arguments.stages}")
    config = load_config(arguments.config, overrides)
    processes = config.parallel.pipeline_stages if arguments.processes is None else arguments.processes
    if processes < 1:
        raise LimeError(f"--processes {processes} must be at least 1")
    machine = Machine(
        flops=arguments.flops * arguments.efficiency,
        memory_bandwidth=arguments.memory_bandwidth,
        bandwidth=arguments.bandwidth,
        latency=arguments.latency,
        memory=arguments.gpu_memory,
    )
    if arguments.sweep:
        if arguments.timeline is not None:
            raise LimeError("--timeline draws one configuration; leave out --sweep, or run the command twice")
        result = with_parts(sweep(config, machine, processes), machine, processes, BEST)
        values = sweep_values(result, config)
        print(json.dumps(values, indent=1) if arguments.json else sweep_table(values, machine.memory))
        return
    chosen = with_checkpointing(config, machine.memory, processes)
    planned = forecast(chosen, machine, processes)
    values = plan_values(config, chosen, machine, planned)
    print(json.dumps(values, indent=1) if arguments.json else plan_table(config, values))
    if arguments.timeline is not None:
        from lime_dist.plan.timeline import draw_timeline

        draw_timeline(chosen, machine, planned, arguments.timeline)
        if not arguments.json:
            print(f"\ntimeline: {arguments.timeline}")


# -- one configuration ----------------------------------------------------------------------------------------------------


def plan_values(config: Config, chosen: Config, machine: Machine, planned: Forecast) -> Values:
    """All numbers of a plan, in FLOPs, bytes and seconds.

    Args:
        chosen: the result of `with_checkpointing`. (The LLaMA beside it chooses for itself, and cuts its own stages.)
        planned: the forecast of ``chosen`` on the machine.
    """
    processes = planned.replicas * len(planned.stages)
    consumed_samples, seconds = whole_run(chosen, machine, planned)
    values: Values = {
        "processes": processes,
        "replicas": planned.replicas,
        "micro_batches": planned.micro_batches,
        "tokens_per_step": planned.tokens,
        "parameters": planned.parameters,
        "machine": vars(machine),
        "stages": [stage_values(planned, stage) for stage in range(len(planned.stages))],
        "flops_per_step": planned.flops,
        "peak_memory": planned.peak_memory,
        "fits": machine.memory is None or planned.peak_memory <= machine.memory,
        "bubble": planned.bubble,
        "seconds_per_step": planned.seconds,
        "tokens_per_second": planned.tokens / planned.seconds,
        "seconds": vars(planned.parts),
        "limit": planned.limit,
        "keys_per_token": (attention_length(config.data, config.model.vocab_size) + 1) / 2,
        "total_tokens": consumed_samples * config.data.sequence_length,
        "total_hours": seconds / 3600,
        "checkpointing_choice": describe_checkpointing(config, chosen, machine.memory),
    }
    baseline = as_baseline(config)
    if baseline.model.architecture != config.model.architecture:
        llama = forecast(baseline, machine, processes)
        values["over_llama"] = {
            "flops": planned.flops / llama.flops,
            "memory": planned.peak_memory / llama.peak_memory,
            "time": planned.seconds / llama.seconds,
        }
    return values


def stage_values(planned: Forecast, stage: int) -> Values:
    """One row of the table."""
    each = planned.stages[stage]
    return {
        "stage": stage,
        "layers": [each.parts[0].start, each.parts[0].stop],
        **({"parts": [[layers.start, layers.stop] for layers in each.parts]} if len(each.parts) > 1 else {}),
        "checkpointing": each.checkpointing,
        "parameters": each.parameters,
        "forward_flops": each.forward_flops,
        "backward_flops": each.backward_flops,
        "memory": {**vars(each.memory), "peak": each.memory.peak},
        "bytes_to_next": each.boundary_bytes,
        "bytes_from_next": each.boundary_bytes,
        "entries_to_next": len(each.crossing.entries),
        "mixtures_to_next": len(each.crossing.mixtures),
        "crosses_to_next": str(each.crossing) if each.boundary_bytes else None,
        "between_replicas": vars(each.exchange),
    }


# -- the sweep ------------------------------------------------------------------------------------------------------------


def sweep_values(result: Sweep, config: Config) -> Values:
    """The best combinations, and how many were tried.

    Args:
        config: the configuration that they change.
    """
    return {
        "tried": len(result.fitting) + len(result.too_large),
        "fitting": len(result.fitting),
        "best": [candidate_values(candidate, config) for candidate in result.best(BEST)],
        "smallest_that_does_not_fit": candidate_values(result.too_large[0], config) if result.too_large else None,
    }


def candidate_values(candidate: Candidate, config: Config) -> Values:
    forecasted = candidate.forecast
    return {
        "pipeline_stages": candidate.stages,
        "virtual_stages": candidate.parts,
        "replicas": forecasted.replicas,
        "micro_batch_size": candidate.micro_batch_size,
        "micro_batches": forecasted.micro_batches,
        "history": candidate.policy,
        "overrides": candidate.overrides(config),
        "seconds_per_step": forecasted.seconds,
        "seconds": vars(forecasted.parts),
        "limit": forecasted.limit,
        "bubble": forecasted.bubble,
        "peak_memory": forecasted.peak_memory,
    }


if __name__ == "__main__":
    run_command(main)
