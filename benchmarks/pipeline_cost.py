"""Measure a training step on two stages: step time over LLaMA's on the same engine, bytes over the boundary, and what the
simulator predicts for both, over loopback and over a slow link.

stock-tuple   DeepSpeed's schedule and transfers; hidden state and history as a tuple, copied in every layer: the usual way
stock         DeepSpeed's schedule and blocking transfers (pipeline.schedule: stock) with this program's one payload
overlap       this program's engine (pipeline.schedule: 1f1b)
zero-bubble   the same engine with weight passes (pipeline.schedule: zero_bubble)
parts-V       the same engine with V parts a stage (pipeline.schedule: interleaved, parallel.virtual_stages)
again-V       the same, but with as many bytes as if every entry were sent again to a stage that has it (not a way to train)

Two processes build every variant once. Each round runs one step of every variant; the first round warms up and
is dropped. Times are medians. The simulator gets the seconds of forward, backward and weight passes that the stages measured
over loopback, and the rate of a single transfer on each link.

examples:
  python benchmarks/pipeline_cost.py --output runs/pipeline_cost
  python benchmarks/pipeline_cost.py --output runs/pipeline_cost --links loopback --rounds 5
  python benchmarks/pipeline_cost.py --output runs/zero_bubble --variants 'overlap llama' 'zero-bubble llama' --micro-batches 4
  python benchmarks/pipeline_cost.py --output /tmp/toy --layers 8 --hidden 32 --heads 4 --length 32 --micro-batches 4

The slow link needs root (two network namespaces); without root it is left out with a message. A link that is in
results.json of --output is not measured again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from links import LOOPBACK, Hosts, NoNamespaces, slow_link
from pair import run_pair
from results import read_results, write, write_results

from lime_dist import load_config
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.schedules.base import make_schedule
from lime_dist.pipeline.wire_format import WireFormat
from lime_dist.plan.simulate import Link, StageTimes, simulate
from lime_dist.plan.stage_times import boundary_bytes

CHUNKED = "model.lime.history={policy: chunked, chunk_size: 16, rank: 2, first: 2}"
MODELS: dict[str, list[str]] = {
    "llama": ["model.architecture=llama"],
    "full": [],
    "first_last": ["model.lime.history={policy: first_last, first: 2, last: 1}"],
    "chunked": [CHUNKED],
    "dilated": ["model.lime.history={policy: dilated, stride: 4, first: 1, last: 1}"],
}
SCHEDULES = {
    "overlap": "1f1b", "zero-bubble": "zero_bubble", "stock": "stock", "stock-tuple": "stock", "parts-2": "interleaved",
    "parts-4": "interleaved", "again-4": "interleaved",
}  # fmt: skip
"""The pipeline.schedule of each engine."""
PARTS = {"parts-2": 2, "parts-4": 4, "again-4": 4}
"""The parallel.virtual_stages of each engine, if it is not 1."""
AGAIN = {"again-4"}
"""The engines that send every entry again."""
VARIANTS = {f"{engine} {model}": (engine, model) for engine in ("overlap", "stock") for model in MODELS}
VARIANTS |= {f"zero-bubble {model}": ("zero-bubble", model) for model in ("llama", "full", "first_last")}
VARIANTS |= {f"{engine} {model}": (engine, model) for engine in PARTS for model in ("llama", "full", "first_last")}
del VARIANTS["again-4 llama"]  # it has no entries
VARIANTS["stock-tuple full"] = ("stock-tuple", "full")
DEPTHS = (4, 8)
"""Numbers of stages that are simulated."""
LINKS = ("loopback", "slow")

Result = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=user_path, help="folder for table.md and results.json")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rate", default="200mbit", help="rate of the slow link, each way")
    parser.add_argument("--delay", type=float, default=0.0, help="delay of the slow link, each way, in seconds")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--extra", type=int, default=1, help="pipeline.extra_in_flight of overlap and zero-bubble")
    parser.add_argument("--held-back", type=int, help="pipeline.deferred_weight_passes of zero-bubble")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; the SwiGLU has four times as much")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="samples per micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--vocabulary", type=int, default=4096)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    for name in ("layers", "micro_batches", "rounds", "batch", "length"):
        if getattr(arguments, name) < 1:
            raise LimeError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "links")}
    for engine, model in map(VARIANTS.__getitem__, settings["variants"]):
        make_config(settings, engine, model, 2)  # report mistakes before anything runs
    results = read_results(arguments.output, settings)
    for name in arguments.links:
        if name in results:
            print(f"{name}: already measured", flush=True)
            continue
        try:
            with ExitStack() as stack:
                hosts = LOOPBACK
                if name == "slow":
                    hosts = stack.enter_context(slow_link(arguments.rate, arguments.delay))
                results[name] = measure(hosts, settings, name)
        except NoNamespaces as error:
            print(f"slow link left out: {error}", flush=True)
            continue
        write_results(arguments.output, settings, results)
    table = make_tables(settings, results)
    write(arguments.output / "table.md", table)
    print(table)


def make_config(settings: dict[str, Any], engine: str, model: str, stages: int) -> Config:
    """Return the configuration of a variant."""
    hidden = settings["hidden"]
    shape = {
        "model.vocab_size": settings["vocabulary"], "model.hidden_size": hidden, "model.intermediate_size": 4 * hidden,
        "model.num_hidden_layers": settings["layers"], "model.num_attention_heads": settings["heads"],
        "data.sequence_length": settings["length"], "train.micro_batch_size": settings["batch"],
        "train.global_batch_size": settings["batch"] * settings["micro_batches"],
        "parallel.pipeline_stages": stages, "pipeline.extra_in_flight": settings["extra"],
        "pipeline.schedule": SCHEDULES[engine],
    }  # fmt: skip
    if engine in PARTS:
        shape["parallel.virtual_stages"] = PARTS[engine]
    if settings["held_back"] is not None:
        shape["pipeline.deferred_weight_passes"] = settings["held_back"]
    return load_config(None, [*(f"{key}={value}" for key, value in shape.items()), *MODELS[model]])


def measure(hosts: Hosts, settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Run all variants on two processes, one per host."""
    ranks = run_pair(hosts, "pipeline_worker.py", {**settings, "link": name})
    return {
        "bandwidth": ranks[0]["bandwidth"],
        "latency": ranks[0]["latency"],
        "variants": {
            variant: {
                "seconds": ranks[0]["variants"][variant]["seconds"],
                "bytes": ranks[0]["variants"][variant]["bytes"],
                "stages": [rank["variants"][variant]["stage"] for rank in ranks],
            }
            for variant in settings["variants"]
        },
    }


# -- tables ---------------------------------------------------------------------------------------------------------------


def make_tables(settings: dict[str, Any], links: dict[str, dict[str, Any]]) -> str:
    parts = [link_table(settings, name, links) for name in LINKS if name in links]
    if "loopback" in links:
        parts += [depth_table(settings, links, depth) for depth in DEPTHS if depth <= settings["layers"]]
        if any(VARIANTS[variant][0] in PARTS for variant in settings["variants"]):
            parts.append(kept_table(settings, links))
    return "\n".join(parts)


def variant_bytes(config: Config, engine: str) -> Sequence[int]:
    """Return the bytes of a micro-batch over each boundary."""
    return again_bytes(config, stage_bounds(config)) if engine in AGAIN else boundary_bytes(config)


def again_bytes(config: Config, bounds: Sequence[int]) -> list[int]:
    """Return what they would be if a stage received every entry again for each of its parts."""
    tokens = config.train.micro_batch_size * config.data.sequence_length
    return [WireFormat.of(config, bound).nbytes(tokens) for bound in bounds[1:-1]]


def part_times(stages: Sequence[dict[str, Any]]) -> list[StageTimes]:
    """Return the measured seconds by part; part v · stages + s is the v-th one of stage s."""
    return [
        StageTimes(forward, backward, stage["weights"])
        for by_part in zip(*(stage["parts"] for stage in stages), strict=True)
        for stage, (forward, backward) in zip(stages, by_part, strict=True)
    ]


def simulated(
    settings: dict[str, Any],
    variant: str,
    links: dict[str, dict[str, Any]],
    name: str,
    sizes: Sequence[int] | None = None,
) -> float:
    """Return the simulated step time of a variant on a link, from the times of its stages over loopback.

    Args:
        sizes: bytes over the boundaries, if they are not those of the variant.
    """
    engine, model = VARIANTS[variant]
    stages = links["loopback" if "loopback" in links else name]["variants"][variant]["stages"]
    config = make_config(settings, engine, model, 2)
    trace = simulate(
        part_times(stages),
        variant_bytes(config, engine) if sizes is None else sizes,
        Link(links[name]["bandwidth"], links[name]["latency"]),
        make_schedule(config, settings["micro_batches"]),
        update=max(stage["update"] for stage in stages),
        fill_waits=True,
    )
    return trace.seconds


def link_table(settings: dict[str, Any], name: str, links: dict[str, dict[str, Any]]) -> str:
    """Return the table by variant: step time and ratios, bytes predicted and counted, simulated time and waits."""
    result = links[name]
    speed = f"{result['bandwidth'] / 1e6:.0f} MB/s, {result['latency'] * 1e3:.2f} ms, measured"
    lines = [
        f"{name} ({speed})", "",
        "| variant | s/step | over LLaMA, same engine | over stock LLaMA | over overlap, same model | waiting, s by stage | "
        "bytes predicted | counted | simulated | measured/simulated |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    seconds = {variant: result["variants"][variant]["seconds"] for variant in settings["variants"]}
    for variant in settings["variants"]:
        engine, model = VARIANTS[variant]
        bases = f"{engine.removesuffix('-tuple')} llama", "stock llama", f"overlap {model}"
        ratios = " | ".join(ratio(seconds[variant], seconds.get(base)) for base in bases)
        config = make_config(settings, engine, model, 2)
        predicted = sum(variant_bytes(config, engine)[::2]) * settings["micro_batches"]  # the first stage's
        expected = simulated(settings, variant, links, name)
        median = statistics.median(seconds[variant])
        counted = result["variants"][variant]["bytes"]
        waits = ", ".join(f"{stage['waiting']:.2f}" for stage in result["variants"][variant]["stages"])
        lines.append(
            f"| {variant} | {median:.2f} | {ratios} | {waits} | "
            f"{predicted:,} | {counted:,} | {expected:.2f} | {median / expected:.3f} |"
        )
    return "\n".join(lines) + "\n"


def ratio(own: Sequence[float], base: Sequence[float] | None) -> str:
    """Return the median over rounds of the ratio within a round; a dash if the base was not measured."""
    if base is None:
        return "–"
    return f"{statistics.median(a / b for a, b in zip(own, base, strict=True)):.3f}"


def depth_table(settings: dict[str, Any], links: dict[str, dict[str, Any]], depth: int) -> str:
    """Return the table for ``depth`` equal stages: bytes over each boundary, simulated steps, and the share of a step in which stages
    do not compute. (Two cores cannot show the bubbles of more than two stages.)"""
    lines = [
        f"{depth} stages, simulated", "",
        f"| variant | bytes over the boundaries, a micro-batch | {' | '.join(f'{name}, s/step | idle' for name in links)} |",
        f"|---|---|{'---|---|' * len(links)}",
    ]  # fmt: skip
    for variant in settings["variants"]:
        engine, model = VARIANTS[variant]
        parts = depth * PARTS.get(engine, 1)
        if parts > settings["layers"]:
            continue
        measured = part_times(links["loopback"]["variants"][variant]["stages"])
        times = StageTimes(
            *(sum(getattr(each, key) for each in measured) / parts for key in ("forward", "backward", "weights"))
        )
        config = make_config(settings, engine, model, depth)
        sizes, schedule = variant_bytes(config, engine), make_schedule(config, settings["micro_batches"])
        cells = []
        for result in links.values():
            link = Link(result["bandwidth"], result["latency"])
            trace = simulate([times] * parts, sizes, link, schedule, fill_waits=True)
            cells += [f"{trace.seconds:.2f}", f"{100 * statistics.mean(trace.bubble):.1f} %"]
        lines.append(f"| {variant} | {', '.join(f'{size:,}' for size in sizes)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def kept_table(settings: dict[str, Any], links: dict[str, dict[str, Any]]) -> str:
    """Return the table of what it saves that stages keep entries: bytes of a micro-batch over all boundaries, and simulated steps, against
    a stage that receives every entry again for each of its parts."""
    lines = [
        "two stages: entries that are kept, against entries that are sent again", "",
        f"| variant | bytes, a micro-batch | sent again | {' | '.join(f'{name}, s/step | sent again | ratio' for name in links)} |",
        f"|---|---|---|{'---|---|---|' * len(links)}",
    ]  # fmt: skip
    for variant in settings["variants"]:
        engine, model = VARIANTS[variant]
        if engine in PARTS and engine not in AGAIN:
            config = make_config(settings, engine, model, 2)
            kept, again = boundary_bytes(config), again_bytes(config, stage_bounds(config))
            cells = []
            for name in links:
                own, other = (simulated(settings, variant, links, name, sizes) for sizes in (kept, again))
                cells += [f"{own:.2f}", f"{other:.2f}", f"{own / other:.3f}"]
            lines.append(f"| {variant} | {sum(kept):,} | {sum(again):,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
