"""``python -m lime_dist.plan``: what a run will cost, per stage and step, and which settings would make it faster."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lime_dist.config.load import load_config
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError, run_command
from lime_dist.plan.forecast import Forecast, Machine, as_llama, forecast
from lime_dist.plan.quantities import read_bandwidth, read_bytes, read_flops, read_seconds, read_share
from lime_dist.plan.sweep import Candidate, Sweep, sweep
from lime_dist.plan.text import plan_table, sweep_table

Values = dict[str, Any]
BEST = 5

EXAMPLES = """examples:
  python -m lime_dist.plan --config configs/deep/lime_128.yaml
  python -m lime_dist.plan --config configs/deep/lime_128.yaml --stages 16 --processes 64 --gpu-memory 80GB train.micro_batch_size=1
  python -m lime_dist.plan --config configs/deep/lime_128.yaml --processes 64 --gpu-memory 80GB --bandwidth 200Gbit --sweep
  python -m lime_dist.plan --config configs/quickstart.yaml --flops 40G --efficiency 1 --bandwidth 2GB --timeline timeline.png

Parameters and bytes are exact. Memory is the peak of live tensor bytes; allocator, libraries and context come on top. Time is
that of matrix products at --flops × --efficiency, of all else that moves memory at --memory-bandwidth (by rule of thumb, and
as if nothing were fused), of transfers and reductions. Left out: the optimizer's update, data, checkpoints."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lime_dist.plan", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", required=True, help="YAML file with the sections of a run")
    parser.add_argument("--stages", type=int, metavar="P", help="parallel.pipeline_stages")
    parser.add_argument("--processes", type=int, metavar="N", help="of the job (default: one replica's)")
    parser.add_argument("--gpu-memory", type=read_bytes, metavar="80GB", help="what a process may use (default: any)")
    parser.add_argument("--memory-bandwidth", type=read_bandwidth, default="3TB", metavar="3TB",
                        help="between a process and its memory, a second (default: %(default)s)")  # fmt: skip
    parser.add_argument("--bandwidth", type=read_bandwidth, default="400Gbit", metavar="400Gbit",
                        help="between processes, each way, a second (default: %(default)s)")  # fmt: skip
    parser.add_argument("--latency", type=read_seconds, default="5us", metavar="5us", help="(default: %(default)s)")
    parser.add_argument("--flops", type=read_flops, default="800T", metavar="800T",
                        help="peak of a process, a second (default: %(default)s)")  # fmt: skip
    parser.add_argument("--efficiency", type=read_share, default="0.6", metavar="0.6",
                        help="the share of it that matrix products reach (default: %(default)s)")  # fmt: skip
    parser.add_argument("--sweep", action="store_true",
                        help=f"the {BEST} fastest of stages × micro-batch × history policy that fit the memory")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the same numbers as JSON")
    parser.add_argument(
        "--timeline", type=Path, metavar="PNG", help="draw what each stage does when (needs matplotlib)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    overrides = list(arguments.overrides)
    if arguments.stages is not None:
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
            raise LimeError("--timeline draws the configuration as it is; leave --sweep out, or call twice")
        found = sweep(config, machine, processes)
        print(
            json.dumps(sweep_values(found), indent=1)
            if arguments.json
            else sweep_table(sweep_values(found), machine.memory)
        )
        return
    values = plan_values(config, machine, processes)
    print(json.dumps(values, indent=1) if arguments.json else plan_table(config, values))
    if arguments.timeline is not None:
        from lime_dist.plan.timeline import draw_timeline

        draw_timeline(config, machine, values["micro_batches"], arguments.timeline)
        if not arguments.json:
            print(f"\ntimeline: {arguments.timeline}")


# -- one configuration ----------------------------------------------------------------------------------------------------


def plan_values(config: Config, machine: Machine, processes: int) -> Values:
    """All numbers of a plan, in FLOPs, bytes and seconds."""
    found = forecast(config, machine, processes)
    values: Values = {
        "processes": processes,
        "replicas": found.replicas,
        "micro_batches": found.micro_batches,
        "tokens_per_step": found.tokens,
        "parameters": found.parameters,
        "machine": vars(machine),
        "stages": [stage_values(found, stage) for stage in range(len(found.stages))],
        "flops_per_step": found.flops,
        "peak_memory": found.peak_memory,
        "fits": machine.memory is None or found.peak_memory <= machine.memory,
        "bubble": found.bubble,
        "seconds_per_step": found.seconds,
        "tokens_per_second": found.tokens / found.seconds,
        "seconds": vars(found.parts),
        "limit": found.limit,
    }
    if config.model.architecture != "llama":
        llama = forecast(as_llama(config), machine, processes)
        values["over_llama"] = {
            "flops": found.flops / llama.flops,
            "memory": found.peak_memory / llama.peak_memory,
            "time": found.seconds / llama.seconds,
        }
    return values


def stage_values(found: Forecast, stage: int) -> Values:
    """One row of the table."""
    each = found.stages[stage]
    return {
        "stage": stage,
        "layers": [each.layers.start, each.layers.stop],
        "parameters": each.parameters,
        "forward_flops": each.forward_flops,
        "backward_flops": each.backward_flops,
        "memory": {**vars(each.memory), "peak": each.memory.peak},
        "bytes_to_next": each.boundary_bytes,
        "bytes_from_next": each.boundary_bytes,
    }


# -- the sweep ------------------------------------------------------------------------------------------------------------


def sweep_values(found: Sweep) -> Values:
    """The best settings, and how many there were."""
    return {
        "tried": len(found.fitting) + len(found.too_large),
        "fitting": len(found.fitting),
        "best": [candidate_values(candidate) for candidate in found.best(BEST)],
        "smallest_that_does_not_fit": candidate_values(found.too_large[0]) if found.too_large else None,
    }


def candidate_values(candidate: Candidate) -> Values:
    forecasted = candidate.forecast
    return {
        "pipeline_stages": candidate.stages,
        "replicas": forecasted.replicas,
        "micro_batch_size": candidate.micro_batch_size,
        "micro_batches": forecasted.micro_batches,
        "history": candidate.policy,
        "seconds_per_step": forecasted.seconds,
        "seconds": vars(forecasted.parts),
        "limit": forecasted.limit,
        "bubble": forecasted.bubble,
        "peak_memory": forecasted.peak_memory,
    }


if __name__ == "__main__":
    run_command(main)
