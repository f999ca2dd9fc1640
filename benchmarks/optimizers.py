"""Compare AdamW with Muon, each at the learning rate that suits it.

First both are trained once at each learning rate from a seed of its own (--sweep-seed), then at the best one from the seeds given, the
same for both. Routers keep their learning rate. The difference is paired by seed.

    python benchmarks/optimizers.py --data data/quickstart/shards --output runs/optimizers --jobs 1
    python benchmarks/optimizers.py --data … --output … --jobs 2 --steps 200 parallel.pipeline_stages=1

Resumable: after a stop, the same command finishes the rest (`runs.py`).
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from pairs import mean_and_spread, mean_interval
from runs import Study, add_options
from sweep import add_sweep_options, check_sweep_seed, sweep_losses

from lime_dist.errors import run_command

NAMES = ("adamw", "muon")


def variant(name: str, lr: float) -> str:
    return f"{name}-lr{lr:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=400)
    parser.set_defaults(seeds=[1, 2, 3])
    add_sweep_options(parser, [1e-3, 2e-3, 4e-3])
    arguments = parser.parse_args()
    check_sweep_seed(arguments)
    tried = {
        variant(name, lr): [f"optimizer.name={name}", f"optimizer.lr={lr}"] for name in NAMES for lr in arguments.lrs
    }
    sweep = replace(Study.from_options(arguments, [], tried), seeds=[arguments.sweep_seed])
    sweep.run(arguments.jobs)
    swept = sweep_losses(sweep, list(tried), arguments.sweep_seed)
    best = {name: min((variant(name, lr) for lr in arguments.lrs), key=swept.__getitem__) for name in NAMES}
    study = replace(sweep, seeds=arguments.seeds, variants={one: tried[one] for one in best.values()})
    study.run(arguments.jobs)
    lines = [f"| | {' | '.join(f'{lr:g}' for lr in arguments.lrs)} |", f"|---{'|---' * len(arguments.lrs)}|"]
    lines += [f"| {name} | {' | '.join(f'{swept[variant(name, lr)]:.4f}' for lr in arguments.lrs)} |" for name in NAMES]
    seeds = study.finished_seeds()
    if len(seeds) > 1:
        losses = {name: study.losses(best[name], seeds) for name in NAMES}
        pairs = [muon - adamw for adamw, muon in zip(*losses.values(), strict=True)]
        low, high = mean_interval(pairs)
        lines += ["", f"| at its best, {len(seeds)} seeds | validation loss |", "|---|---|"]
        lines += [f"| {best[name]} | {mean_and_spread(losses[name])} |" for name in NAMES]
        lines += [f"| muon minus adamw | {statistics.fmean(pairs):+.4f} [{low:+.4f}, {high:+.4f}] |"]
    table = "\n".join(lines) + "\n"
    (study.output / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    run_command(main)
