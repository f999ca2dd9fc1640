"""Compare how well a pipeline learns whose history entries cross in float8 and one whose payloads cross in bf16: the quickstart.

    python benchmarks/wire_loss.py --data data/quickstart/shards --output runs/wire --jobs 1
    python benchmarks/wire_loss.py --data … --output … --seeds 0 1 --steps 100 parallel.pipeline_stages=4

A run is one process per stage. Resumable: after a stop, the same command finishes the rest (`runs.py`).
"""

from __future__ import annotations

import argparse

from pairs import mean_and_spread
from runs import Study, add_options

from lime_dist.errors import LimeError, run_command

WIRES = {name: [f"pipeline.wire_dtype={name}"] for name in ("bf16", "fp8")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=400)
    arguments = parser.parse_args()
    study = Study.from_options(arguments, [], WIRES)
    study.run(arguments.jobs)
    seeds = study.finished_seeds()
    if not seeds:
        raise LimeError("no seed is finished for both; run the same command again")
    losses = {name: study.losses(name, seeds) for name in WIRES}
    paired = [fp8 - bf16 for fp8, bf16 in zip(losses["fp8"], losses["bf16"], strict=True)]
    lines = ["| seed | bf16 | fp8 | difference |", "|---|---|---|---|"]
    for seed, bf16, fp8, difference in zip(seeds, losses["bf16"], losses["fp8"], paired, strict=True):
        lines.append(f"| {seed} | {bf16:.4f} | {fp8:.4f} | {difference:+.4f} |")
    means = [mean_and_spread(losses["bf16"]), mean_and_spread(losses["fp8"]), mean_and_spread(paired, sign="+")]
    lines.append(f"| mean | {' | '.join(means)} |")
    table = "\n".join(lines) + "\n"
    (study.output / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    run_command(main)
