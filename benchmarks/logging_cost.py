"""Measure what monitoring costs: the share of step time for measuring, gathering, drawing and writing.

    python benchmarks/logging_cost.py --data data/quickstart/shards --output runs/logging_cost
    python benchmarks/logging_cost.py --data … --output … --steps 20 train.log_interval=1 monitor.router_interval=1

Runs configs/quickstart.yaml on two processes of this machine, with its default intervals. Every function that only serves monitoring
is timed (`logging_cost_worker.py`), on rank 0, which does most of the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from links import LOOPBACK
from pair import run_pair
from results import write

from lime_dist import load_config
from lime_dist.config.load import dump_config
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path

CONFIG = Path(__file__).resolve().parents[1] / "configs/quickstart.yaml"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=user_path, help="folder with dataset.json")
    parser.add_argument(
        "--output", required=True, type=user_path, help="folder for the run and the table; must not exist"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    output = arguments.output.resolve()
    if output.exists():
        raise LimeError(f"--output {output} is there already; give another folder, or delete it")
    config = load_config(
        CONFIG,
        [
            "train.evaluation_interval=0", *arguments.overrides, f"train.steps={arguments.steps}",
            f"data.path={arguments.data.resolve()}", f"run.directory={output / 'run'}",
        ],
    )  # fmt: skip
    measured = run_pair(LOOPBACK, "logging_cost_worker.py", {"config": dump_config(config)})[0]
    steps, seconds, calls = measured["step_seconds"], measured["seconds"], measured["calls"]
    lines = ["| | calls | seconds | of step time |", "|---|---|---|---|"]
    for name in seconds:
        lines.append(f"| {name} | {calls[name]:,} | {seconds[name]:.3f} | {100 * seconds[name] / steps:.2f} % |")
    whole = sum(seconds.values())
    lines.append(f"| all | {sum(calls.values()):,} | {whole:.3f} | {100 * whole / steps:.2f} % |")
    table = "\n".join(lines) + "\n"
    write(output / "table.md", table)
    print(
        f"{arguments.steps} steps of {steps / arguments.steps:.3f} s; train.log_interval={config.train.log_interval}, "
        f"monitor.router_interval={config.monitor.router_interval}\n\n{table}"
    )


if __name__ == "__main__":
    run_command(main)
