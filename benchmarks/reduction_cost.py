"""Measure what two replicas of one stage exchange in a step: single collectives, and the data-parallel part of training steps.

Collectives over a piece of float32: an all-reduce (ZeRO 0); for ZeRO 1 one reduce-scatter and one all-gather, as on NCCL, against a
reduction to, and a broadcast from, the owner of each slice, as on gloo.

Steps: of a LLaMA with ZeRO 0 and 1, whose pieces start to be summed within the last backward pass, or after it. The data-parallel
part is the time from the end of the passes to the averaged gradients, and that of gathering weights. Rounds alternate; times are
medians. The first round warms up.

examples:
  python benchmarks/reduction_cost.py --output runs/reduction_cost
  python benchmarks/reduction_cost.py --output /tmp/toy --elements 1000 --hidden 32 --layers 4 --length 32 --rounds 1
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from links import LOOPBACK
from pair import run_pair
from results import write, write_results

from lime_dist import load_config
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path

STEPS = {
    f"ZeRO {zero}, {start}": (zero, start == "within the last pass")
    for zero in (0, 1)
    for start in ("after the passes", "within the last pass")
}
"""ZeRO stage of each row, and whether sums start early."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=user_path, help="folder for table.md and results.json")
    parser.add_argument("--elements", type=int, default=1 << 23, help="of the piece")
    parser.add_argument("--piece", type=int, default=1 << 20, help="elements of a piece in training steps")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; the SwiGLU has four times as much")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    for name, value in settings.items():
        if value < 1:
            raise LimeError(f"--{name} {value} must be at least 1")
    make_config(settings, 0)  # report mistakes before anything runs
    arguments.output.mkdir(parents=True, exist_ok=True)
    ranks = run_pair(LOOPBACK, "reduction_worker.py", settings)
    write_results(arguments.output, settings, {"ranks": ranks})
    table = make_tables(settings, ranks[0])
    write(arguments.output / "table.md", table)
    print(table)


def make_config(settings: dict[str, Any], zero_stage: int) -> Config:
    """Return the configuration of a training step: one stage, two replicas of two micro-batches each."""
    hidden = settings["hidden"]
    shape = {
        "model.architecture": "llama", "model.hidden_size": hidden, "model.intermediate_size": 4 * hidden,
        "model.num_hidden_layers": settings["layers"], "model.vocab_size": 4096, "data.sequence_length": settings["length"],
        "train.micro_batch_size": 1, "train.global_batch_size": 4, "parallel.pipeline_stages": 1,
        "parallel.zero_stage": zero_stage,
    }  # fmt: skip
    return load_config(None, [f"{key}={value}" for key, value in shape.items()])


def make_tables(settings: dict[str, Any], result: dict[str, Any]) -> str:
    megabytes = 4 * settings["elements"] / 1e6
    lines = [f"collectives of two processes over {megabytes:.1f} MB", "", "| collective | ms |", "|---|---|"]
    lines += [f"| {name} | {1e3 * statistics.median(seconds):.1f} |" for name, seconds in result["collectives"].items()]
    lines += [
        "", "| training step | step, ms | sums after the passes, ms | gathering weights, ms | calls | MB summed | MB gathered |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in result["steps"].items():
        times = " | ".join(f"{1e3 * statistics.median(row[key]):.1f}" for key in ("step", "sums", "gather"))
        lines.append(
            f"| {name} | {times} | {row['calls']:.0f} | {row['summed'] / 1e6:.1f} | {row['gathered'] / 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
