"""``python -m lime_dist.plan``: what a run will cost, per stage and step, and which settings would make it faster."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lime_dist.config.load import load_config
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError, run_command
from lime_dist.forecast import Forecast, Machine, as_llama, forecast
from lime_dist.quantities import (
    read_bandwidth,
    read_bytes,
    read_flops,
    read_seconds,
    read_share,
    show,
    show_seconds,
)
from lime_dist.sweep import Candidate, Sweep, sweep

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
        print(json.dumps(sweep_values(found), indent=1) if arguments.json else sweep_table(found, machine))
        return
    values = plan_values(config, machine, processes)
    print(json.dumps(values, indent=1) if arguments.json else plan_table(config, values))
    if arguments.timeline is not None:
        from lime_dist.timeline import draw_timeline

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


COLUMNS = [
    "stage", "layers", "parameters", "forward", "backward", "weights", "optimizer", "activations", "history", "transfers",
    "working", "peak", "in flight", "to next",
]  # fmt: skip


def plan_table(config: Config, values: Values) -> str:
    """A plan for people."""
    train, parallel, model = config.train, config.parallel, config.model
    lines = [
        f"{model.architecture}, {model.num_hidden_layers} layers, {values['parameters']:,} parameters; "
        f"{parallel.pipeline_stages} stage(s) × {values['replicas']} replica(s); {values['micro_batches']} micro-batches of "
        f"{train.micro_batch_size} × {config.data.sequence_length} tokens a step and replica; {config.precision}",
        f"a process reaches {show(values['machine']['flops'], 'FLOP/s')} and moves "
        f"{show(values['machine']['memory_bandwidth'], 'B/s')}; {show(values['machine']['bandwidth'], 'B/s')} and "
        f"{show_seconds(values['machine']['latency'])} between processes",
        "",
        *columns([COLUMNS, *(stage_row(row) for row in values["stages"])]),
        "",
        "forward, backward: FLOPs of a micro-batch; memory in bytes at the peak of 1F1B, with as many micro-batches in flight;",
        "to next: bytes of a micro-batch, and as many back.",
        "",
    ]
    peak, memory = values["peak_memory"], values["machine"]["memory"]
    limit = "" if memory is None else f" of {show(memory, 'B')}: {'it fits' if values['fits'] else 'it DOES NOT FIT'}"
    lines.append(f"memory    {show(peak, 'B')} on the fullest stage{limit}")
    share = [
        f"{name} {100 * seconds / values['seconds_per_step']:.1f} %"
        for name, seconds in values["seconds"].items()
        if seconds
    ]
    lines.append(
        f"step      {show_seconds(values['seconds_per_step'])} predicted, {show(values['tokens_per_second'])} tokens/s: "
        f"{', '.join(share)}"
    )
    lines.append(f"bubble    {100 * values['bubble']:.1f} % of the step a stage does not compute, on average")
    lines.append(f"limit     {values['limit']}: {explain(values)}")
    if "over_llama" in values:
        over = values["over_llama"]
        lines.append(
            f"over LLaMA, same settings: FLOPs × {over['flops']:.3f}, memory × {over['memory']:.3f}, "
            f"time × {over['time']:.3f}"
        )
    return "\n".join(lines)


def stage_row(row: Values) -> list[str]:
    begin, end = row["layers"]
    memory = row["memory"]
    parts = ("weights", "optimizer", "activations", "history", "transfers", "working", "peak")
    return [
        str(row["stage"]), f"{begin}–{end - 1}", f"{row['parameters']:,}", show(row["forward_flops"]),
        show(row["backward_flops"]), *(show(memory[name], "B") for name in parts), str(memory["in_flight"]),
        show(row["bytes_to_next"], "B") if row["bytes_to_next"] else "",
    ]  # fmt: skip


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def explain(values: Values) -> str:
    """What the limit means here, in a line."""
    stages = values["stages"]
    passes = [row["forward_flops"] + row["backward_flops"] for row in stages]
    busiest, widest = passes.index(max(passes)), max(range(len(stages)), key=lambda s: stages[s]["bytes_to_next"])
    return {
        "computation": "stages compute for most of the step",
        "imbalance": f"stage {busiest} computes {max(passes) * len(passes) / sum(passes):.1f} times the average "
        "(parallel.stage_layers; fewer stages; the output projection is all on the last)",
        "link": f"stage {widest} sends {show(stages[widest]['bytes_to_next'], 'B')} a micro-batch "
        "(pipeline.wire_dtype; a bounded history; pipeline.extra_in_flight)",
        "bubble": f"{values['micro_batches']} micro-batches a step fill and drain {len(stages)} stages (smaller micro-batches; "
        "fewer stages)",
        "latency": "transfers are short and many (larger micro-batches; fewer stages)",
        "reduction": "gradients are reduced after the passes (fewer replicas; a larger global batch)",
    }[values["limit"]]


# -- the sweep ------------------------------------------------------------------------------------------------------------


def sweep_values(found: Sweep) -> Values:
    """The best settings, and how many there were."""
    return {
        "tried": len(found.fitting) + len(found.too_large),
        "fitting": len(found.fitting),
        "best": [candidate_values(candidate) for candidate in found.fitting[:BEST]],
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


def sweep_table(found: Sweep, machine: Machine) -> str:
    values = sweep_values(found)
    limit = "" if machine.memory is None else f" of {show(machine.memory, 'B')}"
    lines = [
        f"{values['tried']} settings tried, {values['fitting']} fit"
        + (f" into {show(machine.memory, 'B')}" if machine.memory else "")
    ]
    if values["best"]:
        header = ["", "stages × replicas", "micro-batch", "history", "step", "memory", "reason"]
        rows = [
            [
                str(place), f"{row['pipeline_stages']} × {row['replicas']}", str(row["micro_batch_size"]),
                history(row["history"]), show_seconds(row["seconds_per_step"]), show(row["peak_memory"], "B") + limit,
                reason(row),
            ]
            for place, row in enumerate(values["best"], 1)
        ]  # fmt: skip
        lines += ["", *columns([header, *rows])]
    if (smallest := values["smallest_that_does_not_fit"]) is not None:
        lines += [
            "",
            f"of those that do not fit, {smallest['pipeline_stages']} stages × micro-batch {smallest['micro_batch_size']} × "
            f"{history(smallest['history'])} needs least: {show(smallest['peak_memory'], 'B')}",
        ]
    lines += ["", "Ranked by time alone: how well a policy learns is in benchmarks/RESULTS.md, and the same efficiency is assumed",
              "for all micro-batch sizes."]  # fmt: skip
    return "\n".join(lines)


def history(policy: Values | None) -> str:
    """A policy and its keys: first_last, first 2, last 1."""
    if policy is None:
        return "–"
    return ", ".join(str(value) if key == "policy" else f"{key} {value}" for key, value in policy.items())


def reason(row: Values) -> str:
    """What makes up its step: the parts of at least one percent, the largest first."""
    parts = sorted(row["seconds"].items(), key=lambda part: -part[1])
    whole = row["seconds_per_step"]
    return ", ".join(f"{name} {100 * seconds / whole:.0f} %" for name, seconds in parts if seconds >= 0.01 * whole)


if __name__ == "__main__":
    run_command(main)
