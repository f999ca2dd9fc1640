"""Measure a training step of a full history with entries over the boundaries and with the minimum of entries and partial mixtures,
over loopback and over slow links.

One process per stage; over slow links one host (a network namespace) per stage, as root. Every process builds both forms once, and
rounds alternate; the first one warms up and is dropped. The ratio is the median over rounds of that within a round. Bytes of
a step are counted; so is the peak of live tensor bytes on the last stage, in a further step.

examples:
  python benchmarks/boundary_cost.py --output runs/boundary_cost
  python benchmarks/boundary_cost.py --output runs/loopback --links loopback --stages 2
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from typing import Any

from links import LOOPBACK, Hosts, slow_link
from pair import run_pair
from results import read_results, write, write_results

from lime_dist import load_config
from lime_dist.config.schema import Config
from lime_dist.errors import run_command
from lime_dist.model.architecture import model_crossings
from lime_dist.paths import user_path
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.shared_weights import boundary_prices
from lime_dist.plan.stage_times import boundary_bytes

FORMS = ("entries", "minimal")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=user_path, help="folder for table.md and results.json")
    parser.add_argument("--links", nargs="+", choices=("loopback", "slow"), default=["loopback", "slow"])
    parser.add_argument("--rate", default="50mbit", help="rate of what leaves a host over the slow links")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="rounds that count")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "links")}
    results = read_results(arguments.output, settings)
    for name in arguments.links:
        if name not in results:
            with ExitStack() as stack:
                hosts = Hosts(LOOPBACK.commands[:1] * arguments.stages, LOOPBACK.address, LOOPBACK.interface)
                if name == "slow":
                    hosts = stack.enter_context(slow_link(arguments.rate, 0.0, arguments.stages))
                results[name] = run_pair(hosts, "boundary_worker.py", settings)
            write_results(arguments.output, settings, results)
    table = make_table(settings, results)
    write(arguments.output / "table.md", table)
    print(table)


def make_config(settings: dict[str, Any], form: str) -> Config:
    stages, layers = settings["stages"], settings["layers"]
    return load_config(None, [
        "model.vocab_size=1024", "model.hidden_size=256", "model.intermediate_size=1024", "model.num_attention_heads=8",
        f"model.num_hidden_layers={layers}", f"data.sequence_length={settings['length']}", "train.micro_batch_size=1",
        f"train.global_batch_size={settings['micro_batches']}", f"parallel.pipeline_stages={stages}",
        f"parallel.stage_layers={[layers // stages] * stages}", f"pipeline.boundary={form}",
    ])  # fmt: skip


def make_table(settings: dict[str, Any], results: dict[str, Any]) -> str:
    lines = [
        "| links | what crosses | s/step | over entries | over each boundary | MB of a step, counted | predicted | peak of the last stage, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, ranks in results.items():
        seconds = {form: ranks[0][form]["seconds"] for form in FORMS}
        for form in FORMS:
            config = make_config(settings, form)
            crossing = model_crossings(config.model, boundary_prices(config))
            over = ", ".join(str(crossing[bound]) for bound in stage_bounds(config)[1:-1])
            predicted = 2 * settings["micro_batches"] * sum(boundary_bytes(config)) / 1e6
            counted = sum(rank[form]["sent"] for rank in ranks) / 1e6
            pairs = zip(seconds[form], seconds["entries"], strict=True)
            ratio = statistics.median(own / other for own, other in pairs)
            lines.append(
                f"| {name} | {form} | {statistics.median(seconds[form]):.2f} | {ratio:.2f} | {over} | {counted:.1f} | "
                f"{predicted:.1f} | {ranks[-1][form]['peak'] / 1e6:.1f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
