"""Simulate at which depth links, not computation, become the limit of a pipeline, by history policy.

Depth grows from 32 to 1024 layers with a fixed number of layers per stage. So the work of a stage stays the same, while
the boundary bytes grow with the history. A step has four micro-batches per stage, so that filling and draining take
the same share at all depths. Steps are simulated exactly (`lime_dist/plan/wavefront.py`), for pipelines of up to 512 stages.

examples:
  python benchmarks/crossover.py --output runs/crossover
  python benchmarks/crossover.py --output /tmp/slow --bandwidth 100Gbit model.num_key_value_heads=16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from results import plotting, write

from lime_dist import load_config
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.plan.forecast import Machine, Parts, machine_times, step_parts
from lime_dist.plan.quantities import read_bandwidth, read_flops, read_seconds, show, show_seconds
from lime_dist.plan.simulate import StageTimes
from lime_dist.plan.stage_times import boundary_bytes, stage_times

SIZE = [
    "model.hidden_size=2048", "model.intermediate_size=8192", "model.num_attention_heads=16", "model.num_key_value_heads=4",
    "model.vocab_size=32768", "data.sequence_length=2048", "train.micro_batch_size=1", "precision=bf16",
]  # fmt: skip
"""The size behind the picture in RESULTS.md; overrides of the command line follow."""
POLICIES: dict[str, list[str]] = {
    "llama": ["model.architecture=llama"],
    "first_last": ["model.lime.history={policy: first_last, first: 2, last: 1}"],
    "chunked": ["model.lime.history={policy: chunked, chunk_size: 16, rank: 2, first: 2}"],
    "dilated": ["model.lime.history={policy: dilated, stride: 4, first: 1, last: 1}"],
    "full": [],
    "full, entries alone": ["pipeline.boundary=entries"],
}
DEPTHS = [32, 64, 128, 256, 512, 1024]
PER_STAGE, MICRO_BATCHES_PER_STAGE = 2, 4
BANDWIDTHS = ["100Gbit", "400Gbit", "1600Gbit"]
COLOURS = {
    "computation": "#4477aa",
    "imbalance": "#99bbdd",
    "link": "#ee8866",
    "bubble": "#dddddd",
    "latency": "#bb5566",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=user_path, help="folder for table.md and crossover.png")
    parser.add_argument(
        "--flops", type=read_flops, default="480T", help="FLOP/s that a process reaches (default: %(default)s)"
    )
    parser.add_argument(
        "--memory-bandwidth", type=read_bandwidth, default="3TB", help="of a process (default: %(default)s)"
    )
    parser.add_argument("--bandwidth", type=read_bandwidth, default="400Gbit", help="of a link (default: %(default)s)")
    parser.add_argument("--latency", type=read_seconds, default="5us", help="of a link (default: %(default)s)")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help=f"multiples of {PER_STAGE}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    machine = Machine(arguments.flops, arguments.memory_bandwidth, arguments.bandwidth, arguments.latency)
    for depth in arguments.depths:
        if depth < 2 * PER_STAGE or depth % PER_STAGE:
            raise LimeError(f"--depths {depth} must be a multiple of {PER_STAGE}, at least {2 * PER_STAGE}")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LimeError(f"--output {arguments.output}: {error.strerror}; give another folder") from None
    steps_by_policy: dict[str, list[Parts]] = {}
    crossings: dict[str, list[str]] = {}
    for name in POLICIES:
        configs = [make_config(name, depth, arguments.overrides) for depth in sorted(arguments.depths)]
        steps_by_policy[name] = [simulate_step(config, machine) for config in configs]
        crossings[name] = [
            crossing(name, max(arguments.depths), arguments.overrides, machine, bandwidth) for bandwidth in BANDWIDTHS
        ]
    table = make_table(sorted(arguments.depths), steps_by_policy, crossings)
    write(arguments.output / "table.md", table)
    print(table)
    draw(sorted(arguments.depths), steps_by_policy, machine, arguments.output / "crossover.png")


def make_config(name: str, depth: int, overrides: list[str]) -> Config:
    """Return the configuration of a pipeline with this depth and equal stages."""
    stages = depth // PER_STAGE
    shape = [f"model.num_hidden_layers={depth}", f"parallel.pipeline_stages={stages}",
             f"parallel.stage_layers={[PER_STAGE] * stages}"]  # fmt: skip
    return load_config(None, [*SIZE, *shape, *POLICIES[name], *overrides])


def simulate_step(config: Config, machine: Machine) -> Parts:
    times = pass_times(config, machine)
    return step_parts(config, times, boundary_bytes(config), machine, MICRO_BATCHES_PER_STAGE * len(times), 0.0)


def pass_times(config: Config, machine: Machine) -> list[StageTimes]:
    bounds = stage_bounds(config)
    return machine_times(config, machine, bounds, stage_times(config, 1.0, bounds))


def crossing(name: str, most: int, overrides: list[str], machine: Machine, bandwidth: str) -> str:
    """Return the depth of the shallowest pipeline, up to ``most`` layers, with a boundary whose transfers take longer than the passes
    of the next stage."""

    def is_limited(depth: int) -> bool:
        config = make_config(name, depth, overrides)
        times, sizes = pass_times(config, machine), boundary_bytes(config)
        return any(
            size / read_bandwidth(bandwidth) > each.forward + each.backward
            for size, each in zip(sizes, times[1:], strict=True)
        )

    if not is_limited(most):
        return "–"
    few, many = PER_STAGE, most  # not limited, limited
    while many - few > PER_STAGE:
        middle = (few + many) // (2 * PER_STAGE) * PER_STAGE
        few, many = (few, middle) if is_limited(middle) else (middle, many)
    return str(many)


def share(seconds: float, parts: Parts) -> str:
    return f"{100 * seconds / sum(vars(parts).values()):.0f} %"


def make_table(depths: list[int], steps_by_policy: dict[str, list[Parts]], crossings: dict[str, list[str]]) -> str:
    """Return the step time by policy and depth, with the shares of computation (including imbalance) and links."""
    lines = [
        f"| layers × stages | {' | '.join(f'{depth} × {depth // PER_STAGE}' for depth in depths)} |",
        f"|---|{'---|' * len(depths)}",
    ]
    for name, steps in steps_by_policy.items():
        cells = [
            f"{show_seconds(sum(vars(parts).values()))}: {share(parts.computation + parts.imbalance, parts)}, "
            f"{share(parts.link, parts)}"
            for parts in steps
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "", "Cells: a step's time; shares of computation (with imbalance) and of link. The rest is filling and draining.", "",
        f"| layers from which on links are the limit | {' | '.join(BANDWIDTHS)} |", f"|---|{'---|' * len(BANDWIDTHS)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in crossings.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(depths: list[int], steps_by_policy: dict[str, list[Parts]], machine: Machine, path: Path) -> None:
    """Draw one panel per policy with the shares of the step against depth, and one with times over LLaMA's."""
    if (pyplot := plotting()) is None:
        return
    figure, all_axes = pyplot.subplots(2, 4, figsize=(17, 7.2))
    for axes, (name, steps) in zip(all_axes.flat, steps_by_policy.items(), strict=False):
        whole = [sum(vars(parts).values()) for parts in steps]
        rows = [[100 * getattr(p, part) / t for p, t in zip(steps, whole, strict=True)] for part in COLOURS]
        axes.stackplot(depths, rows, colors=COLOURS.values(), labels=COLOURS)
        axes.set_title(name)
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of the step")
    all_axes.flat[-1].set_axis_off()
    last = all_axes.flat[-2]
    for name, steps in steps_by_policy.items():
        ratios = [
            sum(vars(a).values()) / sum(vars(b).values()) for a, b in zip(steps, steps_by_policy["llama"], strict=True)
        ]
        last.plot(depths, ratios, "o-", label=name, markersize=4)
    last.set_title("step time over LLaMA's")
    last.set_yscale("log")
    last.legend(fontsize=8)
    last.grid(alpha=0.3, which="both")
    for axes in all_axes.flat[:-1]:
        axes.set_xscale("log", base=2)
        axes.set_xlim(depths[0], depths[-1])
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_xlabel(f"layers, {PER_STAGE} per stage")
    handles, labels = all_axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"{show(machine.flops, 'FLOP/s')}, memory {show(machine.memory_bandwidth, 'B/s')}, "
        f"links {show(8 * machine.bandwidth, 'bit/s')}; "
        f"{MICRO_BATCHES_PER_STAGE} micro-batches per stage, one extra in flight"
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


if __name__ == "__main__":
    run_command(main)
